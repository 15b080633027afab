"""Which routes exist, what they cost, who is drawn and who runs when. Pure Python, no torch."""
