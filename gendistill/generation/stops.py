class Ending:
    def __init__(self, tokenizer, *, end_ids, stop, max_new_tokens):
        self.t, self.e, self.m = tokenizer, end_ids, max_new_tokens
        self.token_ids, self.ended = [], False

    @property
    def text(self):
        return self.t.decode(self.token_ids, skip_special_tokens=True)

    def add(self, token):
        if token in self.e:
            self.ended = True
            return True
        self.token_ids.append(token)
        return len(self.token_ids) == self.m
