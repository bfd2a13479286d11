"""Reading labelled images, drawing episodes, and the episode store."""
