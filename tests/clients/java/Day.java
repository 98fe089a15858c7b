import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Timestamp;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.time.Instant;
import java.util.Iterator;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import outbox.v1.*;

/**
 * A realistic day of a caller of Outbox, in Java, from protos/ alone.
 *
 * <p>{@code java Day HOST:PORT SERVICE_CONFIG}. It prints a line per step. At the line "restart" it
 * waits until a line on stdin says that the scheduler was killed, while it watches a batch.
 */
public final class Day {
  private static final String USER = "java";

  private final SenderServiceGrpc.SenderServiceBlockingStub senders;
  private final BatchServiceGrpc.BatchServiceBlockingStub batches;
  private final EmailJobServiceGrpc.EmailJobServiceBlockingStub jobs;

  private Day(ManagedChannel channel) {
    senders = SenderServiceGrpc.newBlockingStub(channel);
    batches = BatchServiceGrpc.newBlockingStub(channel);
    jobs = EmailJobServiceGrpc.newBlockingStub(channel);
  }

  public static void main(String[] words) throws Exception {
    // Deadlines and retries are those of the service config. Gson reads each number as a Double,
    // as gRPC wants them.
    String config = new String(Files.readAllBytes(Paths.get(words[1])), "UTF-8");
    @SuppressWarnings("unchecked")
    Map<String, Object> parsed = new Gson().fromJson(config, Map.class);
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(words[0])
            .usePlaintext()
            .defaultServiceConfig(parsed)
            .enableRetry()
            .build();
    Day day = new Day(channel);
    String sender = day.createSender();
    day.readRefusals(sender);
    String batch = day.schedule(sender, 5, null);
    day.watch(sender, batch);
    day.list(batch);
    day.cancel(sender, batch);
    day.exceedDeadline(sender);
    System.out.println("done");
    channel.shutdownNow();
  }

  private String createSender() {
    CreateSenderRequest request =
        CreateSenderRequest.newBuilder()
            .setUserId(USER)
            .setRequestId("sender-1")
            .setSender(Sender.newBuilder().setEmail("java@example.com"))
            .build();
    String first = senders.createSender(request).getSenderId();
    // As after an answer that got lost.
    String again = senders.createSender(request).getSenderId();
    System.out.println("sender is the same: " + first.equals(again));
    return first;
  }

  private void readRefusals(String sender) throws Exception {
    Sender wrong = Sender.newBuilder().setEmail("nobody").setHourlyLimit(-5).build();
    printRefusal(
        () ->
            senders.createSender(
                CreateSenderRequest.newBuilder().setUserId(USER).setSender(wrong).build()));
    ScheduleBatchRequest.Builder batch = request(sender, 1, null).toBuilder();
    batch.getOptionsBuilder().setSubject("Hello {{ name");
    printRefusal(() -> batches.scheduleBatch(batch.build()));
  }

  /** Prints the reason of an error, and the fields that are wrong. */
  private static void printRefusal(Runnable call) throws InvalidProtocolBufferException {
    StatusRuntimeException refused = null;
    try {
      call.run();
    } catch (StatusRuntimeException error) {
      refused = error;
    }
    StringBuilder line = new StringBuilder();
    for (Any detail : StatusProto.fromThrowable(refused).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        ErrorInfo info = detail.unpack(ErrorInfo.class);
        line.append(info.getReason());
        if (info.containsMetadata("state")) {
          line.append(" state=").append(info.getMetadataOrThrow("state"));
        }
      } else if (detail.is(BadRequest.class)) {
        for (BadRequest.FieldViolation one :
            detail.unpack(BadRequest.class).getFieldViolationsList()) {
          line.append(" ").append(one.getField());
        }
      }
    }
    System.out.println("refused: " + line);
  }

  private String schedule(String sender, int count, Timestamp at) {
    Batch batch = batches.scheduleBatch(request(sender, count, at)).getBatch();
    System.out.println("accepted: " + batch.getAcceptedCount());
    return batch.getBatchId();
  }

  private static ScheduleBatchRequest request(String sender, int count, Timestamp at) {
    Recipients.Builder rows = Recipients.newBuilder();
    for (int number = 0; number < count; number++) {
      rows.addRows(
          Recipient.newBuilder()
              .setEmail("r" + number + "@example.org")
              .putColumns("name", "R" + number));
    }
    BatchOptions.Builder options =
        BatchOptions.newBuilder()
            .setRequestId("batch-" + System.nanoTime())
            .setUserId(USER)
            .setSenderId(sender)
            .setSubject("Hello {{ name }}")
            .setBody("Good to see you.");
    if (at != null) {
      options.setScheduleTime(at);
    }
    return ScheduleBatchRequest.newBuilder().setOptions(options).setRecipients(rows).build();
  }

  /** Follows a batch to its end. The scheduler is killed meanwhile. */
  private void watch(String sender, String batch) throws Exception {
    String token = "";
    for (int cuts = 0; ; cuts++) {
      WatchBatchRequest request =
          WatchBatchRequest.newBuilder()
              .setBatchId(batch)
              .setUserId(USER)
              .setResumeToken(token)
              .build();
      try {
        for (Iterator<WatchBatchResponse> stream = batches.watchBatch(request); stream.hasNext(); ) {
          WatchBatchResponse update = stream.next();
          if (token.isEmpty()) {
            readWhileTheServerRestarts(sender);
          }
          token = update.getResumeToken();
          if (update.getDone()) {
            long sent = update.getBatch().getCounts().getSentCount();
            System.out.println("watched: sent " + sent + ", resumed " + (cuts > 0));
            return;
          }
        }
      } catch (StatusRuntimeException error) {
        if (error.getStatus().getCode() != Status.Code.UNAVAILABLE) {
          throw error;
        }
      }
      Thread.sleep(100); // The stream was cut: it goes on from the token.
    }
  }

  private void readWhileTheServerRestarts(String sender) throws IOException {
    System.out.println("restart");
    System.in.read();
    // gRPC tries again by itself.
    GetSenderRequest request =
        GetSenderRequest.newBuilder().setSenderId(sender).setUserId(USER).build();
    System.out.println("read after the restart: " + senders.getSender(request).getEmail());
  }

  private void list(String batch) {
    ListEmailJobsRequest.Builder request =
        ListEmailJobsRequest.newBuilder()
            .setUserId(USER)
            .setFilter("batch_id = " + batch + " AND state = SENT")
            .setPageSize(2);
    int pages = 0;
    int count = 0;
    do {
      ListEmailJobsResponse page = jobs.listEmailJobs(request.build());
      count += page.getEmailJobsCount();
      pages += page.getEmailJobsCount() > 0 ? 1 : 0;
      request.setPageToken(page.getNextPageToken());
    } while (!request.getPageToken().isEmpty());
    System.out.println("listed: " + count + " in " + pages + " pages");
  }

  private void cancel(String sender, String sent) throws Exception {
    Timestamp at = Timestamp.newBuilder().setSeconds(Instant.now().getEpochSecond() + 3600).build();
    String later = schedule(sender, 3, at);
    EmailJob job = jobs.cancelEmailJob(cancellation(later));
    CancelBatchResponse answer =
        batches.cancelBatch(
            CancelBatchRequest.newBuilder().setBatchId(later).setUserId(USER).build());
    System.out.println(
        "cancelled: " + job.getState() + ", then " + answer.getCancelledCount());
    printRefusal(() -> jobs.cancelEmailJob(cancellation(sent)));
  }

  /** Returns the request that cancels the first job of a batch. */
  private CancelEmailJobRequest cancellation(String batch) {
    ListEmailJobsResponse page =
        jobs.listEmailJobs(
            ListEmailJobsRequest.newBuilder().setUserId(USER).setBatchId(batch).build());
    return CancelEmailJobRequest.newBuilder()
        .setEmailJobId(page.getEmailJobs(0).getEmailJobId())
        .setUserId(USER)
        .build();
  }

  private void exceedDeadline(String sender) {
    Status.Code code = Status.Code.OK;
    try {
      senders
          .withDeadlineAfter(1, TimeUnit.NANOSECONDS)
          .getSender(GetSenderRequest.newBuilder().setSenderId(sender).setUserId(USER).build());
    } catch (StatusRuntimeException error) {
      code = error.getStatus().getCode();
    }
    System.out.println("deadline exceeded: " + (code == Status.Code.DEADLINE_EXCEEDED));
  }
}
