// Adds the rows of the table `mails` to the queue, each at its time; or ROWS rows of five columns,
// which it makes itself. Prints how long the calls of addBulk took.
import { Queue } from "bullmq";
import { QUEUE, database, redis } from "./mails.js";

const CHUNK = 1000;
const rows = Number(process.env.ROWS ?? 0);
const queue = new Queue(QUEUE, { connection: redis() });

async function* chunks() {
  if (rows) {
    for (let first = 0; first < rows; first += CHUNK) {
      yield Array.from({ length: Math.min(CHUNK, rows - first) }, (_, i) => ({
        email: `r${first + i}@example.net`,
        name: `Ann Example ${first + i}`,
        order: String(first + i).padStart(8, "0"),
        city: "Springfield",
        points: String((first + i) % 200),
      }));
    }
    return;
  }
  const pool = database(1);
  const text = `SELECT id, sender, recipient, name, "order", city, due_at FROM mails
                WHERE id > $1 ORDER BY id LIMIT ${CHUNK}`;
  for (let last = 0; ; ) {
    const found = (await pool.query(text, [last])).rows;
    if (!found.length) break;
    last = found.at(-1).id;
    yield found;
  }
  await pool.end();
}

let milliseconds = 0;
let count = 0;
for await (const chunk of chunks()) {
  const jobs = chunk.map(({ due_at: due, ...data }) => ({
    name: "mail",
    data,
    opts: due ? { delay: Math.max(0, due - Date.now()) } : {},
  }));
  const began = performance.now();
  await queue.addBulk(jobs);
  milliseconds += performance.now() - began;
  count += jobs.length;
}
console.log(JSON.stringify({ count, seconds: milliseconds / 1000 }));
await queue.close();
process.exit(0);
