"""How the shipped checkpoint was made."""
