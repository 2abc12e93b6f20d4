"""Generation and likelihood of teachers and students, many sequences at a time, at the hardware's speed."""
