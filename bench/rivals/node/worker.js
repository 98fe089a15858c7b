// Sends the mails of the queue until SIGTERM: BullMQ, a pooled nodemailer, and one UPDATE per mail.
import { Worker } from "bullmq";
import nodemailer from "nodemailer";
import { QUEUE, database, mailOf, redis } from "./mails.js";

const concurrency = Number(process.env.CONCURRENCY);
const pool = database(20);
const smtp = nodemailer.createTransport({
  host: "127.0.0.1",
  port: Number(process.env.SMTP_PORT),
  pool: true,
  maxConnections: concurrency,
  maxMessages: 100,
  ignoreTLS: true,
});

const worker = new Worker(
  QUEUE,
  async ({ data }) => {
    const started = new Date();
    const { response } = await smtp.sendMail(mailOf(data));
    await pool.query({
      name: "sent",
      text: `UPDATE mails SET state = 3, started_at = $2, sent_at = clock_timestamp(), reply = $3
             WHERE id = $1`,
      values: [data.id, started, response],
    });
  },
  { connection: redis(), concurrency, removeOnComplete: { count: 0 } },
);
worker.on("error", (error) => console.error(error.message));
worker.on("failed", (job, error) => console.error(job?.id, error.message));
process.on("SIGTERM", async () => {
  await worker.close(true);
  process.exit(0);
});
