// One pooled nodemailer transport per account, each with a mail every PERIOD_MS, from timers: no
// queue, no store, no limits. Prints how late the mails began, and the processor time per mail after
// the first mail of each account.
import { readFileSync } from "node:fs";
import nodemailer from "nodemailer";
import { mailOf } from "./mails.js";

const accounts = Number(process.env.ACCOUNTS);
const period = Number(process.env.PERIOD_MS);
const rounds = Number(process.env.ROUNDS);
const tls = { ca: readFileSync(process.env.CA_FILE), servername: "", checkServerIdentity: () => undefined };
const transports = Array.from({ length: accounts }, (_, i) =>
  nodemailer.createTransport({
    host: "127.0.0.1",
    port: Number(process.env.SMTP_PORT),
    requireTLS: true,
    pool: true,
    maxConnections: 1,
    maxMessages: Infinity,
    auth: { user: `user${i}`, pass: "secret" },
    tls,
  }),
);
const begin = Date.now() + 500;
const late = [];
const sends = [];
let used;
let failed = 0;
setTimeout(() => (used = process.cpuUsage()), begin + period - Date.now());
const send = async (i, round) => {
  const due = begin + period * round + (period * i) / accounts;
  late.push(Date.now() - due);
  const row = { sender: `s${i}@example.com`, recipient: `r${i}-${round}@example.net`, name: "Ann" };
  try {
    await transports[i].sendMail(mailOf({ ...row, order: String(round), city: "Springfield" }));
  } catch (error) {
    failed += 1;
    console.error(error.message);
  }
};
await new Promise((resolve) => {
  let left = accounts * rounds;
  for (let i = 0; i < accounts; i++) {
    for (let round = 0; round < rounds; round++) {
      const due = begin + period * round + (period * i) / accounts;
      setTimeout(() => {
        sends.push(send(i, round));
        if (!--left) resolve();
      }, due - Date.now());
    }
  }
});
await Promise.all(sends);
const { user, system } = process.cpuUsage(used);
late.sort((a, b) => a - b);
console.log(
  JSON.stringify({
    failed,
    us_per_mail: (user + system) / (accounts * (rounds - 1)),
    late_ms_p99: late[Math.floor(late.length * 0.99)],
    late_ms_max: late.at(-1),
  }),
);
process.exit(0);
