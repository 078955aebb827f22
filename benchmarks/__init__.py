"""Speed, memory and quality, side by side with their references."""
