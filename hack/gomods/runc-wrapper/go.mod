module cowhand.dev/hack/runc-wrapper

go 1.25.0
