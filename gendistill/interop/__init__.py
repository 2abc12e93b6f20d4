"""Other programs that run our models: they are imported with the module that is for them."""
