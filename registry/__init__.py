"""What is remembered: the content-addressed store, the audit trail and the MLflow image."""
