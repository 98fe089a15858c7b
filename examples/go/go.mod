module example.com/outbox-example

go 1.24
