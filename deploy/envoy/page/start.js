SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  docExpansion: "none",
  // Nothing is sent to the validator of swagger.io.
  validatorUrl: null,
});
