"""Who calls, what they may do, and whose sessions they see."""
