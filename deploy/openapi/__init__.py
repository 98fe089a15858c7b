"""Makes the OpenAPI document of the REST API from the descriptor set of the protos."""
