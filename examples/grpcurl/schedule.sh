#!/usr/bin/env bash
# Schedules two mails with grpcurl and waits until they are sent.
#
# schedule.sh [HOST:PORT of the scheduler]. GRPCURL: the path of grpcurl, if it is not in PATH.
set -euo pipefail
scheduler=${1:-127.0.0.1:50051}
grpcurl=${GRPCURL:-grpcurl}

# With TLS: leave -plaintext out. With an API key: -expand-headers -H 'authorization: Bearer ${OUTBOX_API_KEY}'.
call() { "$grpcurl" -plaintext -max-time 30 -d "$2" "$scheduler" "outbox.v1.$1"; }
# Prints the first value of a field. $1 is its name in lower case, without underscores, because grpcurl
# prints sender_id by reflection and senderId with -protoset. With jq: .sender_id // .senderId
field() { awk -F '"' -v name="$1" '{ key = tolower($2); gsub("_", "", key) } key == name && !found { print $4; found = 1 }'; }

sender=$(call SenderService/CreateSender '{"user_id": "grpcurl", "sender": {"email": "grpcurl@example.com"}}' | field senderid)

# A field of type bytes is base64 in JSON.
csv=$(printf 'email,name\nann@example.com,Ann\nbob@example.com,Bob\n' | base64 | tr -d '\n')
# The same request_id returns the same batch, so this call is safe to repeat.
answer=$(call BatchService/ScheduleBatch "{
  \"options\": {
    \"request_id\": \"grpcurl-$(date +%s)-$$\", \"user_id\": \"grpcurl\", \"sender_id\": \"$sender\",
    \"subject\": \"Hello {{ name }}\", \"body\": \"Good to see you.\"
  },
  \"csv\": \"$csv\"
}")
batch=$(field batchid <<<"$answer")
echo "accepted $(field acceptedcount <<<"$answer")"

# Follows the batch until every job is in a final state. A watch has no time limit; one that was
# interrupted is resumed with its last resume_token. With -format-error, errors show their details.
same="{\"batch_id\": \"$batch\", \"user_id\": \"grpcurl\"}"
"$grpcurl" -plaintext -format-error -d "$same" "$scheduler" outbox.v1.BatchService/WatchBatch >/dev/null
now=$(call BatchService/GetBatch "$same")
echo "sent $(field sentcount <<<"$now")"
