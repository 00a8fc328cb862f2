"""What is shipped: the wheels and the sdist, looked into and tried away from the checkout."""
