"""What `fit` and `frontier` are made of: what a client holds, what each choice costs, and the recipe that says it."""
