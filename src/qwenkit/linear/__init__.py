"""Every trick is another kind of Linear, put in place by one walk over the finished model. Imports model and below."""
