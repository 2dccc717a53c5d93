"""Which recipes suit a model, a card and a client: facts as data, the planner's word on each."""
