"""The services of the scheduler, a module each: from protos to the domain and back."""
