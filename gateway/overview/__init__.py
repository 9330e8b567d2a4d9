"""What happens now in the whole system: a row for each model, and what needs an operator's attention."""
