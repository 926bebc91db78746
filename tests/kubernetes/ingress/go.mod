module ingress

go 1.24

require github.com/zalando/skipper v0.21.0
