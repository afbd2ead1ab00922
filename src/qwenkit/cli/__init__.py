"""A verb and its flags; no logic of its own. Imports anything below."""
