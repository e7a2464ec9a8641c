"""How fast is it, and why? Each engine in a process of its own."""
