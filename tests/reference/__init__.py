"""What the fast code is held against: a slow network written from the equations, and the golden vectors."""
