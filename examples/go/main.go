// Schedules two mails over gRPC and waits until they are sent.
//
//	go run . [HOST:PORT of the scheduler]
//
// First generate the code, in this folder (buf.gen.yaml has the options):
//
//	go install google.golang.org/protobuf/cmd/protoc-gen-go@latest
//	go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@latest
//	buf generate ../../protos --path ../../protos/outbox
//	go mod tidy
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	outbox "example.com/outbox-example/gen/outbox/v1"
)

const user = "go"

func main() {
	scheduler := "127.0.0.1:50051"
	if len(os.Args) > 1 {
		scheduler = os.Args[1]
	}
	if err := run(scheduler); err != nil {
		log.Fatal(err)
	}
}

func run(scheduler string) error {
	// With TLS: credentials.NewTLS(nil). With an API key: grpc.WithPerRPCCredentials, which puts
	// "authorization: Bearer ..." into the metadata of every call.
	conn, err := grpc.NewClient(scheduler, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	sender, err := outbox.NewSenderServiceClient(conn).CreateSender(ctx, &outbox.CreateSenderRequest{
		UserId: user,
		Sender: &outbox.Sender{Email: "go@example.com"},
	})
	if err != nil {
		return err
	}

	batches := outbox.NewBatchServiceClient(conn)
	subject, body := "Hello {{ name }}", "Good to see you."
	answer, err := batches.ScheduleBatch(ctx, &outbox.ScheduleBatchRequest{
		Options: &outbox.BatchOptions{
			// The same request_id returns the same batch, so this call is safe to repeat.
			RequestId: rand.Text(),
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

	batch := answer.Batch
	for batch.State == outbox.BatchState_BATCH_STATE_ACTIVE {
		time.Sleep(500 * time.Millisecond)
		batch, err = batches.GetBatch(ctx, &outbox.GetBatchRequest{BatchId: batch.BatchId, UserId: user})
		if err != nil {
			return err
		}
	}
	fmt.Printf("sent %d\n", batch.Counts.SentCount)
	return nil
}
