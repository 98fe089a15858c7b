// A realistic day of a caller of Outbox, in Go, from protos/ alone.
//
//	day HOST:PORT SERVICE_CONFIG
//
// It prints a line per step. At the line "restart" it waits until a line on stdin says that the
// scheduler was killed, while it watches a batch.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	outbox "outbox/v1"
)

const user = "go"

type day struct {
	senders outbox.SenderServiceClient
	batches outbox.BatchServiceClient
	jobs    outbox.EmailJobServiceClient
	ctx     context.Context
}

func main() {
	config, err := os.ReadFile(os.Args[2])
	check(err)
	// Deadlines and retries are those of the service config.
	conn, err := grpc.Dial(os.Args[1], grpc.WithInsecure(), grpc.WithDefaultServiceConfig(string(config)))
	check(err)
	defer conn.Close()
	d := day{
		senders: outbox.NewSenderServiceClient(conn),
		batches: outbox.NewBatchServiceClient(conn),
		jobs:    outbox.NewEmailJobServiceClient(conn),
		ctx:     context.Background(),
	}
	sender := d.createSender()
	d.readRefusals(sender)
	batch := d.schedule(sender, 5, nil)
	d.watch(sender, batch)
	d.list(batch)
	d.cancel(sender, batch)
	d.exceedDeadline(sender)
	fmt.Println("done")
}

func (d day) createSender() string {
	request := &outbox.CreateSenderRequest{
		UserId:    user,
		RequestId: "sender-1",
		Sender:    &outbox.Sender{Email: "go@example.com"},
	}
	first, err := d.senders.CreateSender(d.ctx, request)
	check(err)
	// As after an answer that got lost.
	again, err := d.senders.CreateSender(d.ctx, request)
	check(err)
	fmt.Println("sender is the same:", first.SenderId == again.SenderId)
	return first.SenderId
}

func (d day) readRefusals(sender string) {
	limit := int32(-5)
	_, err := d.senders.CreateSender(d.ctx, &outbox.CreateSenderRequest{
		UserId: user,
		Sender: &outbox.Sender{Email: "nobody", HourlyLimit: &limit},
	})
	printRefusal(err)
	request := request(sender, 1, nil)
	request.Options.Subject = text("Hello {{ name")
	_, err = d.batches.ScheduleBatch(d.ctx, request)
	printRefusal(err)
}

// printRefusal prints the reason of an error, and the fields that are wrong.
func printRefusal(err error) {
	refusal, ok := status.FromError(err)
	if err == nil || !ok {
		fail("not refused:", err)
	}
	reason, fields := "", ""
	for _, detail := range refusal.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = detail.Reason
			if detail.Metadata["state"] != "" {
				fields += " state=" + detail.Metadata["state"]
			}
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fields += " " + violation.Field
			}
		}
	}
	fmt.Printf("refused: %s%s\n", reason, fields)
}

func (d day) schedule(sender string, count int, at *timestamppb.Timestamp) string {
	answer, err := d.batches.ScheduleBatch(d.ctx, request(sender, count, at))
	check(err)
	fmt.Println("accepted:", answer.Batch.AcceptedCount)
	return answer.Batch.BatchId
}

func request(sender string, count int, at *timestamppb.Timestamp) *outbox.ScheduleBatchRequest {
	rows := []*outbox.Recipient{}
	for number := 0; number < count; number++ {
		rows = append(rows, &outbox.Recipient{
			Email:   fmt.Sprintf("r%d@example.org", number),
			Columns: map[string]string{"name": fmt.Sprintf("R%d", number)},
		})
	}
	return &outbox.ScheduleBatchRequest{
		Options: &outbox.BatchOptions{
			RequestId:    fmt.Sprintf("batch-%d", time.Now().UnixNano()),
			UserId:       user,
			SenderId:     sender,
			Subject:      text("Hello {{ name }}"),
			Body:         text("Good to see you."),
			ScheduleTime: at,
		},
		Payload: &outbox.ScheduleBatchRequest_Recipients{Recipients: &outbox.Recipients{Rows: rows}},
	}
}

func text(value string) *string { return &value }

// watch follows a batch to its end. The scheduler is killed meanwhile.
func (d day) watch(sender, batch string) {
	token, cuts := "", 0
	for {
		stream, err := d.batches.WatchBatch(d.ctx, &outbox.WatchBatchRequest{
			BatchId: batch, UserId: user, ResumeToken: token,
		})
		check(err)
		for {
			update, err := stream.Recv()
			if errors.Is(err, io.EOF) || status.Code(err) == codes.Unavailable {
				break // The stream was cut: it goes on from the token.
			}
			check(err)
			if token == "" {
				d.readWhileTheServerRestarts(sender)
			}
			token = update.ResumeToken
			if update.Done {
				fmt.Printf("watched: sent %d, resumed %t\n", update.Batch.Counts.SentCount, cuts > 0)
				return
			}
		}
		cuts++
		time.Sleep(100 * time.Millisecond)
	}
}

func (d day) readWhileTheServerRestarts(sender string) {
	fmt.Println("restart")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	check(err)
	// gRPC tries again by itself.
	found, err := d.senders.GetSender(d.ctx, &outbox.GetSenderRequest{SenderId: sender, UserId: user})
	check(err)
	fmt.Println("read after the restart:", found.Email)
}

func (d day) list(batch string) {
	request := &outbox.ListEmailJobsRequest{
		UserId:   user,
		Filter:   fmt.Sprintf("batch_id = %s AND state = SENT", batch),
		PageSize: 2,
	}
	pages, count := 0, 0
	for {
		page, err := d.jobs.ListEmailJobs(d.ctx, request)
		check(err)
		count += len(page.EmailJobs)
		if len(page.EmailJobs) > 0 {
			pages++
		}
		if page.NextPageToken == "" {
			break
		}
		request.PageToken = page.NextPageToken
	}
	fmt.Printf("listed: %d in %d pages\n", count, pages)
}

func (d day) cancel(sender, sent string) {
	later := d.schedule(sender, 3, timestamppb.New(time.Now().Add(time.Hour)))
	page, err := d.jobs.ListEmailJobs(d.ctx, &outbox.ListEmailJobsRequest{UserId: user, BatchId: later})
	check(err)
	job, err := d.jobs.CancelEmailJob(d.ctx, &outbox.CancelEmailJobRequest{
		EmailJobId: page.EmailJobs[0].EmailJobId, UserId: user,
	})
	check(err)
	answer, err := d.batches.CancelBatch(d.ctx, &outbox.CancelBatchRequest{BatchId: later, UserId: user})
	check(err)
	fmt.Printf("cancelled: %s, then %d\n", job.State, answer.CancelledCount)

	page, err = d.jobs.ListEmailJobs(d.ctx, &outbox.ListEmailJobsRequest{UserId: user, BatchId: sent})
	check(err)
	_, err = d.jobs.CancelEmailJob(d.ctx, &outbox.CancelEmailJobRequest{
		EmailJobId: page.EmailJobs[0].EmailJobId, UserId: user,
	})
	printRefusal(err)
}

func (d day) exceedDeadline(sender string) {
	ctx, cancel := context.WithTimeout(d.ctx, time.Microsecond)
	defer cancel()
	_, err := d.senders.GetSender(ctx, &outbox.GetSenderRequest{SenderId: sender, UserId: user})
	fmt.Println("deadline exceeded:", status.Code(err) == codes.DeadlineExceeded)
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}

func fail(what ...interface{}) {
	fmt.Fprintln(os.Stderr, what...)
	os.Exit(1)
}
