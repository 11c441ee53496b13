"""What the producer reports about itself: balance, status, metrics, and the HTTP endpoint."""
