// Takes the place of the library by which agnhost speaks SCTP, where the kernel has none: `cargo xtask policy-conformance`.
module github.com/ishidawataru/sctp

go 1.24.0
