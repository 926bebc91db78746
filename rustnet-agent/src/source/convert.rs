//! Kubernetes objects to the model: the one place where the API's types are read.
