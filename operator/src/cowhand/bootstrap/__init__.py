"""The Helm hook that makes CA, certificates and store users where they are missing; also run by hand."""
