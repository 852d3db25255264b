"""Load tests with locust, and what is made of their results."""
