"""What the speed and the exactness are measured with."""
