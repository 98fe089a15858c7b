"""What two services need, one module a duty."""
