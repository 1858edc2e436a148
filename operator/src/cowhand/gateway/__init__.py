"""The door for people and clients: the HTTP API over session logs, authenticated and authorised by Kubernetes."""
