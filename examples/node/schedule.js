// Schedules two mails over gRPC and follows them until they are sent.
//
// node schedule.js [HOST:PORT of the scheduler]
'use strict';

const { randomUUID } = require('node:crypto');
const { readFileSync } = require('node:fs');
const { join } = require('node:path');
const { promisify } = require('node:util');
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const { loadFileDescriptorSetFromBuffer } = require('@grpc/proto-loader');

// The descriptors of all protos, written by `make protos` and included in outbox_client's wheel.
// To write it yourself: protoc -I protos --include_imports --descriptor_set_out=...
const descriptors =
  process.env.OUTBOX_DESCRIPTORS || join(__dirname, '../../client/src/outbox/v1/outbox.binpb');
const definition = loadFileDescriptorSetFromBuffer(readFileSync(descriptors), {
  keepCase: true, // sender_id, as in the protos
  defaults: true, // a count of 0 is 0 and not undefined
  longs: Number,
  enums: String,
});
const { outbox } = grpc.loadPackageDefinition(definition);

// A unary call as a promise, with a deadline. With the channel option 'grpc.service_config', deadlines
// and retries come from protos/outbox/v1/service_config.json.
function call(client, method, request) {
  return promisify(client[method].bind(client))(request, metadata, {
    deadline: Date.now() + 30_000,
  });
}

// Follows a batch until every job is in a final state. A watch has no deadline.
async function watch(batches, batch_id, user_id) {
  for (let resume_token = ''; ; await sleep(1000)) {
    try {
      const stream = batches.WatchBatch({ batch_id, user_id, resume_token }, metadata);
      for await (const update of stream) {
        resume_token = update.resume_token;
        if (update.done) return update.batch;
      }
    } catch (error) {
      // A stream that ends before `done` was interrupted, and is resumed.
      if (error.code !== grpc.status.UNAVAILABLE) throw error;
    }
  }
}

// The details of an error are a google.rpc.Status in its trailers: ErrorInfo has the stable reason,
// BadRequest the fields that are wrong.
function describe(error) {
  const message = (name, bytes) => definition[`google.rpc.${name}`].deserialize(bytes);
  const [status] = error.metadata?.get('grpc-status-details-bin') ?? [];
  let text = `${error.details || error.message} (${grpc.status[error.code] || 'error'})`;
  for (const { type_url, value } of status ? message('Status', status).details : []) {
    if (type_url.endsWith('.ErrorInfo')) text += `; ${message('ErrorInfo', value).reason}`;
    if (!type_url.endsWith('.BadRequest')) continue;
    for (const { field, description } of message('BadRequest', value).field_violations) {
      text += `; ${field}: ${description}`;
    }
  }
  return text;
}

const metadata = new grpc.Metadata();
if (process.env.OUTBOX_API_KEY) {
  metadata.set('authorization', `Bearer ${process.env.OUTBOX_API_KEY}`);
}

async function main(scheduler) {
  // With TLS: grpc.credentials.createSsl().
  const credentials = grpc.credentials.createInsecure();
  const senders = new outbox.v1.SenderService(scheduler, credentials);
  const batches = new outbox.v1.BatchService(scheduler, credentials);
  const user_id = 'node';

  const { sender_id } = await call(senders, 'CreateSender', {
    // The same request_id returns the same sender, so this call is safe to repeat.
    request_id: randomUUID(),
    user_id,
    sender: { email: 'node@example.com' },
  });
  const request = {
    options: {
      request_id: randomUUID(),
      user_id,
      sender_id,
      subject: 'Hello {{ name }}',
      body: 'Good to see you.',
    },
    csv: Buffer.from('email,name\nann@example.com,Ann\nbob@example.com,Bob\n'),
  };
  const { batch } = await call(batches, 'ScheduleBatch', request);
  console.log(`accepted ${batch.accepted_count}, rejected ${batch.rejected_count}`);

  const now = await watch(batches, batch.batch_id, user_id);
  console.log(`sent ${now.counts.sent_count}`);
  senders.close();
  batches.close();
}

main(process.argv[2] || '127.0.0.1:50051').catch((error) => {
  console.error(describe(error));
  process.exitCode = 1;
});
