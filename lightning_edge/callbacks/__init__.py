"""The callbacks a user adds to a Trainer: one changes the model, one looks at the result."""
