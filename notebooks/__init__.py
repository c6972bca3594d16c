"""The five notebooks, their solutions, and what they share (`course`)."""
