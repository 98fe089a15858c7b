// Schedules two mails over gRPC and follows them until they are sent.
//
//	go run . [HOST:PORT of the scheduler]
//
// First generate the code, in this folder (buf.gen.yaml has the options):
//
//	go install google.golang.org/protobuf/cmd/protoc-gen-go@latest
//	go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@latest
//	buf generate ../../protos --path ../../protos/outbox
//	go mod tidy
//
// `make test-clients` compiles it with Debian's packages of Go, which are older.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	outbox "example.com/outbox-example/gen/outbox/v1"
)

const user = "go"

func main() {
	scheduler := "127.0.0.1:50051"
	if len(os.Args) > 1 {
		scheduler = os.Args[1]
	}
	if err := run(scheduler); err != nil {
		log.Fatal(describe(err))
	}
}

func run(scheduler string) error {
	// Without TLS, which grpc.WithTransportCredentials(credentials.NewTLS(nil)) adds. With an API
	// key: grpc.WithPerRPCCredentials, which puts "authorization: Bearer ..." into the metadata of
	// every call. Deadlines and retries come from the service config, if you pass it:
	// grpc.WithDefaultServiceConfig(text of protos/outbox/v1/service_config.json).
	conn, err := grpc.Dial(scheduler, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer conn.Close()

	// Without the service config, set a deadline for each call.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	sender, err := outbox.NewSenderServiceClient(conn).CreateSender(ctx, &outbox.CreateSenderRequest{
		// The same request_id returns the same sender, so this call is safe to repeat.
		RequestId: requestID("sender"),
		UserId:    user,
		Sender:    &outbox.Sender{Email: "go@example.com"},
	})
	if err != nil {
		return err
	}

	batches := outbox.NewBatchServiceClient(conn)
	subject, body := "Hello {{ name }}", "Good to see you."
	answer, err := batches.ScheduleBatch(ctx, &outbox.ScheduleBatchRequest{
		Options: &outbox.BatchOptions{
			RequestId: requestID("batch"),
			UserId:    user,
			SenderId:  sender.SenderId,
			Subject:   &subject,
			Body:      &body,
		},
		Payload: &outbox.ScheduleBatchRequest_Csv{
			Csv: []byte("email,name\nann@example.com,Ann\nbob@example.com,Bob\n"),
		},
	})
	if err != nil {
		return err
	}
	fmt.Printf("accepted %d, rejected %d\n", answer.Batch.AcceptedCount, answer.Batch.RejectedCount)

	batch, err := watch(batches, answer.Batch.BatchId)
	if err != nil {
		return err
	}
	fmt.Printf("sent %d\n", batch.Counts.SentCount)
	return nil
}

func requestID(kind string) string {
	return fmt.Sprintf("%s-%d", kind, time.Now().UnixNano())
}

// watch follows a batch until every job is in a final state. A watch has no deadline.
func watch(batches outbox.BatchServiceClient, batchID string) (*outbox.Batch, error) {
	token := ""
	for {
		stream, err := batches.WatchBatch(context.Background(), &outbox.WatchBatchRequest{
			BatchId: batchID, UserId: user, ResumeToken: token,
		})
		for err == nil {
			var update *outbox.WatchBatchResponse
			if update, err = stream.Recv(); err == nil {
				token = update.ResumeToken
				if update.Done {
					return update.Batch, nil
				}
			}
		}
		// A stream that ends before `done` was interrupted, and is resumed.
		if !errors.Is(err, io.EOF) && status.Code(err) != codes.Unavailable {
			return nil, err
		}
		time.Sleep(time.Second)
	}
}

// describe returns an error with its stable reason and the fields that are wrong.
func describe(err error) string {
	text := err.Error()
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			text += fmt.Sprintf(" (%s)", detail.Reason)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				text += fmt.Sprintf("; %s: %s", violation.Field, violation.Description)
			}
		}
	}
	return text
}
