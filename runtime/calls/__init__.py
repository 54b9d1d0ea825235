"""What becomes of a call of the user's module: generations, contexts, captured programs, calls that run at once."""
