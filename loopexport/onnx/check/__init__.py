"""Compare graphs with torch: whether they are exact, and what quantising costs."""
