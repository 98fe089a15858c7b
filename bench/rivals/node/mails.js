// The mail of all contenders, and the connections that the environment names.
import IORedis from "ioredis";
import pg from "pg";

export const QUEUE = "mails";
const SUBJECT = "Your order {{ order }}";
const TEXT = "Dear {{ name }},\n\nyour order {{ order }} leaves {{ city }} today.\n\nThe shop\n";
const HTML = "<p>Dear {{ name }},</p><p>your order <b>{{ order }}</b> leaves {{ city }} today.</p>";

// Puts the columns in, without escaping and without checks.
const insert = (template, row) => template.replace(/{{ (\w+) }}/g, (_, name) => row[name]);

export const mailOf = (row) => ({
  from: row.sender,
  to: row.recipient,
  subject: insert(SUBJECT, row),
  text: insert(TEXT, row),
  html: insert(HTML, row),
});

export const redis = () => new IORedis(process.env.REDIS_URL, { maxRetriesPerRequest: null });
export const database = (max) => new pg.Pool({ connectionString: process.env.DATABASE_URL, max });
