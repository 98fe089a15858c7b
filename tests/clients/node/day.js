// A realistic day of a caller of Outbox, in Node, from protos/ alone.
//
//   node day.js HOST:PORT SERVICE_CONFIG
//
// It prints a line per step. At the line "restart" it waits until a line on stdin says that the
// scheduler was killed, while it watches a batch.
'use strict';

const { join } = require('node:path');
const { readFileSync } = require('node:fs');
const { once } = require('node:events');
const { promisify } = require('node:util');
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const { loadSync } = require('@grpc/proto-loader');

const [address, config] = process.argv.slice(2);
const protos = join(__dirname, '../../../protos');
const user_id = 'node';

const definition = loadSync(
  [
    ...['sender', 'batch', 'email_job'].map((name) => `outbox/v1/${name}_service.proto`),
    'google/rpc/error_details.proto',
    'google/rpc/status.proto',
  ],
  { includeDirs: [protos], keepCase: true, defaults: true, longs: Number, enums: String },
);
const { outbox } = grpc.loadPackageDefinition(definition);
const details = (name) => definition[`google.rpc.${name}`];
// Deadlines and retries are those of the service config.
const options = { 'grpc.service_config': readFileSync(config, 'utf8') };
const credentials = grpc.credentials.createInsecure();
const senders = new outbox.v1.SenderService(address, credentials, options);
const batches = new outbox.v1.BatchService(address, credentials, options);
const jobs = new outbox.v1.EmailJobService(address, credentials, options);

// grpc-js takes deadlines and retries from the config, but waitForReady only from the call.
const call = (client, method, request, more = {}) =>
  promisify(client[method].bind(client))(request, new grpc.Metadata({ waitForReady: true }), more);

// The details of an error are a google.rpc.Status in its trailers.
function detailsOf(error) {
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  const found = {};
  for (const { type_url, value } of bytes ? details('Status').deserialize(bytes).details : []) {
    const name = type_url.split('.').pop();
    found[name] = details(name).deserialize(value);
  }
  return found;
}

async function printRefusal(promise) {
  const error = await promise.then(
    () => { throw new Error('not refused'); },
    (refused) => refused,
  );
  if (!error.metadata) throw error;
  const { ErrorInfo: info, BadRequest: bad } = detailsOf(error);
  const state = info.metadata.state ? ` state=${info.metadata.state}` : '';
  const fields = (bad?.field_violations ?? []).map(({ field }) => ` ${field}`).join('');
  console.log(`refused: ${info.reason}${state}${fields}`);
}

async function createSender() {
  const request = { user_id, request_id: 'sender-1', sender: { email: 'node@example.com' } };
  const first = await call(senders, 'CreateSender', request);
  // As after an answer that got lost.
  const again = await call(senders, 'CreateSender', request);
  console.log(`sender is the same: ${first.sender_id === again.sender_id}`);
  return first.sender_id;
}

function batchOf(sender_id, count, more = {}) {
  const rows = Array.from({ length: count }, (_, number) => ({
    email: `r${number}@example.org`,
    columns: { name: `R${number}` },
  }));
  const request_id = `batch-${process.hrtime.bigint()}`;
  const text = { subject: 'Hello {{ name }}', body: 'Good to see you.' };
  return { options: { request_id, user_id, sender_id, ...text, ...more }, recipients: { rows } };
}

async function readRefusals(sender_id) {
  const sender = { email: 'nobody', hourly_limit: -5 };
  await printRefusal(call(senders, 'CreateSender', { user_id, sender }));
  const wrong = batchOf(sender_id, 1, { subject: 'Hello {{ name' });
  await printRefusal(call(batches, 'ScheduleBatch', wrong));
}

async function schedule(sender_id, count, more) {
  const { batch } = await call(batches, 'ScheduleBatch', batchOf(sender_id, count, more));
  console.log(`accepted: ${batch.accepted_count}`);
  return batch.batch_id;
}

// Follows a batch to its end. The scheduler is killed meanwhile.
async function watch(sender_id, batch_id) {
  let resume_token = '';
  for (let cuts = 0; ; cuts++) {
    try {
      for await (const update of batches.WatchBatch({ batch_id, user_id, resume_token })) {
        if (!resume_token) await readWhileTheServerRestarts(sender_id);
        resume_token = update.resume_token;
        if (update.done) {
          const { sent_count } = update.batch.counts;
          console.log(`watched: sent ${sent_count}, resumed ${cuts > 0}`);
          return;
        }
      }
    } catch (error) {
      if (error.code !== grpc.status.UNAVAILABLE) throw error;
    }
    await sleep(100); // The stream was cut: it goes on from the token.
  }
}

async function readWhileTheServerRestarts(sender_id) {
  console.log('restart');
  await once(process.stdin, 'data');
  process.stdin.destroy();
  // gRPC tries again by itself.
  const { email } = await call(senders, 'GetSender', { sender_id, user_id });
  console.log(`read after the restart: ${email}`);
}

async function list(batch_id) {
  const request = { user_id, filter: `batch_id = ${batch_id} AND state = SENT`, page_size: 2 };
  let pages = 0;
  let count = 0;
  do {
    const page = await call(jobs, 'ListEmailJobs', request);
    count += page.email_jobs.length;
    pages += page.email_jobs.length ? 1 : 0;
    request.page_token = page.next_page_token;
  } while (request.page_token);
  console.log(`listed: ${count} in ${pages} pages`);
}

async function cancel(sender_id, sent) {
  const schedule_time = { seconds: Math.floor(Date.now() / 1000) + 3600 };
  const later = await schedule(sender_id, 3, { schedule_time });
  const first = async (batch_id) =>
    (await call(jobs, 'ListEmailJobs', { user_id, batch_id })).email_jobs[0].email_job_id;
  const job = { email_job_id: await first(later), user_id };
  const { state } = await call(jobs, 'CancelEmailJob', job);
  const answer = await call(batches, 'CancelBatch', { batch_id: later, user_id });
  console.log(`cancelled: ${state}, then ${answer.cancelled_count}`);
  await printRefusal(call(jobs, 'CancelEmailJob', { email_job_id: await first(sent), user_id }));
}

async function exceedDeadline(sender_id) {
  const past = { deadline: Date.now() - 1 };
  const error = await call(senders, 'GetSender', { sender_id, user_id }, past).catch((e) => e);
  console.log(`deadline exceeded: ${error.code === grpc.status.DEADLINE_EXCEEDED}`);
}

async function main() {
  const sender_id = await createSender();
  await readRefusals(sender_id);
  const batch_id = await schedule(sender_id, 5);
  await watch(sender_id, batch_id);
  await list(batch_id);
  await cancel(sender_id, batch_id);
  await exceedDeadline(sender_id);
  console.log('done');
  for (const client of [senders, batches, jobs]) client.close();
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
