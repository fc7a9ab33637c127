"""Compare loops with their base on tasks: run the items, keep the answers, say what they show."""
