"""What the locust scripts are made of."""
