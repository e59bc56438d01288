//! Features of engine dynamodb: tables, throttling, large values, notifications.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    io::{self, BufRead, BufReader, Write},
    process::{Output, Stdio},
    thread,
};

use serde_json::{Value, json};
use streamer_tests::{
    Client, Load, Log, Process, Resharding, Server, Throttle, Throttling, binary,
    dynamodb::{Implementation, endpoint},
    dynamodb_settings, run_tables, tool,
};
use tempfile::TempDir;

fn local() -> &'static str {
    endpoint(Implementation::DynamoDbLocal)
}

fn folder() -> TempDir {
    TempDir::with_prefix("streamer-test-").unwrap()
}

/// Starts a server with separate tables.
fn server(endpoint: &str, settings: &[&str]) -> Server {
    let data = folder();
    let mut all = dynamodb_settings(endpoint, data.path());
    all.extend(settings.iter().map(ToString::to_string));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    Server::start_in(data, &all)
}

fn lines(output: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(output).lines().map(str::to_owned).collect()
}

/// Runs a Python script with boto3 clients for the given endpoint.
fn python(script: &str, endpoint: &str, arguments: &[&str]) -> Output {
    let head = "import boto3, json, sys\n\
        def client(name):\n    return boto3.client(name, endpoint_url=sys.argv[1], \
        region_name='us-east-1', aws_access_key_id='local', aws_secret_access_key='local')\n";
    let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
    command.args(["-c", &format!("{head}{script}"), endpoint]).args(arguments);
    let output = Process::output(&mut command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn tables_are_created_once_and_differences_are_reported_but_not_changed() {
    let data = folder();
    let settings = dynamodb_settings(local(), data.path());
    let again = run_tables("create", &settings, data.path());
    assert!(again.status.success(), "{again:?}");
    assert_eq!(lines(&again.stdout), ["all tables exist; nothing was changed"]);
    let checked = run_tables("check", &settings, data.path());
    assert_eq!(lines(&checked.stdout), ["all tables match the expected schema"]);

    // The tables are like those of an older version: a missing index, a different key and no time to live.
    let prefix = settings.iter().find_map(|s| s.strip_prefix("dynamodb.table_prefix=")).unwrap();
    let script = "c = client('dynamodb'); p = sys.argv[2]\n\
        c.delete_table(TableName=p + 'names')\n\
        c.create_table(TableName=p + 'names', BillingMode='PAY_PER_REQUEST', \
        AttributeDefinitions=[{'AttributeName': 'id', 'AttributeType': 'S'}], \
        KeySchema=[{'AttributeName': 'id', 'KeyType': 'HASH'}])\n\
        c.update_table(TableName=p + 'requests', \
        GlobalSecondaryIndexUpdates=[{'Delete': {'IndexName': 'expiring'}}])\n";
    python(script, local(), &[prefix]);
    for command in ["create", "check"] {
        let output = run_tables(command, &settings, data.path());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let expected = [
            "these tables differ from the expected schema and were not changed:".to_owned(),
            format!("  {prefix}requests: index expiring does not exist"),
            format!("  {prefix}names: its key is id, should be name"),
            format!("  {prefix}names: time to live is not enabled on attribute remove_after"),
        ];
        assert_eq!(lines(&output.stderr), expected);
    }
    let unreachable =
        run_tables("check", &["dynamodb.endpoint=http://127.0.0.1:9".into()], data.path());
    assert_eq!(unreachable.status.code(), Some(3), "{unreachable:?}");
    let no_region = run_tables(
        "check",
        &["dynamodb.endpoint=http://dynamodb.invalid:8000".into()],
        data.path(),
    );
    assert_eq!(no_region.status.code(), Some(2), "{no_region:?}");
    let rule = "error: dynamodb.region: is required, since neither AWS_REGION nor the AWS \
                configuration names one";
    assert_eq!(lines(&no_region.stderr).last().map(String::as_str), Some(rule));
}

/// A running moto server, an emulator of AWS that includes CloudFormation and S3.
struct Moto {
    _process: Process,
    endpoint: String,
}

impl Moto {
    fn start() -> Self {
        let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command);
        let mut log = BufReader::new(process.stderr());
        let mut read = String::new();
        let endpoint = loop {
            let begin = read.len();
            assert!(log.read_line(&mut read).unwrap() > 0, "moto exited: {read}");
            if let Some((_, url)) = read[begin..].split_once(" * Running on ") {
                break url.trim().to_owned();
            }
        };
        // moto logs every call, and blocks when the pipe is full.
        thread::spawn(move || io::copy(&mut log, &mut io::sink()));
        Self { _process: process, endpoint }
    }
}

#[tokio::test]
async fn the_cloudformation_template_is_valid_and_its_tables_work() {
    let data = folder();
    let printed = run_tables("cloudformation", &["dynamodb.table_prefix=cf-".into()], data.path());
    assert!(printed.status.success(), "{printed:?}");
    let template = data.path().join("tables.json");
    std::fs::File::create(&template).unwrap().write_all(&printed.stdout).unwrap();
    let lint = tool("STREAMER_TESTS_PYTHON").with_file_name("cfn-lint");
    let linted = Process::output(Process::command(lint).arg(&template));
    assert!(linted.status.success(), "{}", String::from_utf8_lossy(&linted.stdout));

    let moto = Moto::start();
    let script = "c = client('cloudformation'); t = open(sys.argv[2]).read()\n\
        c.create_stack(StackName='streamer', TemplateBody=t)\n\
        s = c.describe_stacks(StackName='streamer')['Stacks'][0]\n\
        assert s['StackStatus'] == 'CREATE_COMPLETE', s\n\
        assert len(c.describe_stack_resources(StackName='streamer')['StackResources']) == 19\n\
        # moto ignores these properties of the template.\n\
        d = client('dynamodb'); pitr = {'PointInTimeRecoveryEnabled': True}; spec = {'Enabled': True, 'AttributeName': 'remove_after'}\n\
        for r in json.loads(t)['Resources'].values():\n    \
        if r['Type'] != 'AWS::DynamoDB::Table': continue\n    \
        assert r['Properties']['TimeToLiveSpecification'] == spec\n    \
        name = r['Properties']['TableName']['Fn::Sub'].replace('${TablePrefix}', 'cf-')\n    \
        d.update_time_to_live(TableName=name, TimeToLiveSpecification=spec)\n    \
        assert r['Properties']['PointInTimeRecoverySpecification'] == pitr\n    \
        d.update_continuous_backups(TableName=name, PointInTimeRecoverySpecification=pitr)\n";
    python(script, &moto.endpoint, &[template.to_str().unwrap()]);
    let endpoint = format!("dynamodb.endpoint={}", moto.endpoint);
    let settings =
        [endpoint.as_str(), "dynamodb.table_prefix=cf-", "dynamodb.streams_enabled=false"];
    let owned: Vec<String> = settings.iter().map(ToString::to_string).collect();
    let checked = run_tables("check", &owned, data.path());
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    let mut all = vec!["store.engine=dynamodb"];
    all.extend(settings);
    let server = Server::start_in(folder(), &all);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("one", "echo_async", json!({"steps": 5, "output_chunks": 3})).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!((log.last_type(), log.count("output")), ("complete", 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_loses_no_request() {
    let throttle = Throttle::start(local()).await;
    let server = server(&throttle.endpoint, &["execution.poll_interval=100ms"]);
    let token = server.token("acme", "ann", &[]);
    let load = Load::start(std::slice::from_ref(&server.url), &token, 4, false);
    load.wait_for_messages(100).await;
    throttle.set(Throttling::EveryThird);
    // The number of calls per message depends on batching.
    while throttle.rejected() <= 100 {
        load.wait_for_messages(100).await;
    }
    throttle.set(Throttling::Off);
    load.verify("throttled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn throttled_submissions_are_rejected_with_a_retry_delay() {
    let throttle = Throttle::start(local()).await;
    let server = server(&throttle.endpoint, &[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    throttle.set(Throttling::All);
    let message = json!({"id": "one", "action": "echo_async", "payload": {"steps": 1}});
    let rejected = client.request(message.clone()).await;
    let error = &rejected["error"];
    assert_eq!((&error["code"], &error["retryable"]), (&json!("RATE_LIMITED"), &json!(true)));
    assert_eq!(error["details"]["retry_after_ms"], 1000, "{rejected}");
    throttle.set(Throttling::Off);
    let accepted = client.request(message).await;
    assert_eq!(accepted["type"], "acknowledgment", "{accepted}");
    assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
}

fn large(bytes: usize) -> Value {
    json!({"steps": 1, "result": "x".repeat(bytes)})
}

#[tokio::test]
async fn large_values_are_stored_in_the_object_store() {
    let server = server(local(), &["limits.max_payload_bytes=16777216"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for (id, bytes) in [("two", 2_000_000), ("ten", 10_000_000)] {
        client.submit(id, "echo_async", large(bytes)).await;
        let log = client.follow(Log::after(1)).await;
        let result = log.events.last().unwrap()["result"].as_str().unwrap();
        assert_eq!(result.len(), bytes);
    }
    let mut objects = 0;
    for folder in std::fs::read_dir(server.data().join("objects")).unwrap() {
        objects += std::fs::read_dir(folder.unwrap().path()).unwrap().count();
    }
    assert_eq!(objects, 4, "each payload and each result");
}

#[tokio::test]
async fn a_missing_payload_does_not_block_other_requests() {
    let server = server(local(), &["execution.max_concurrent_attempts=1"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let submit = |id: &str, payload: Value| json!({"id": id, "action": "echo_async", "payload": payload, "delay_ms": 500});
    let lost = client.request(submit("lost", large(100_000))).await;
    assert_eq!(lost["type"], "acknowledgment", "{lost}");
    std::fs::remove_dir_all(server.data().join("objects")).unwrap();
    let intact = client.request(submit("intact", json!({"steps": 1}))).await;
    assert_eq!(intact["type"], "acknowledgment", "{intact}");
    let mut log = Log::after(1);
    while !log.has_ended() {
        let message = client.next().await;
        assert_eq!(message["request_id"], "intact", "{message}");
        log.push(message);
    }
    let queued = client.request(json!({"type": "list", "states": ["QUEUED"]})).await;
    assert_eq!(queued["requests"][0]["request_id"], "lost", "{queued}");
}

#[tokio::test]
async fn objects_can_be_stored_in_s3() {
    let moto = Moto::start();
    let script = "client('s3').create_bucket(Bucket='large')\n";
    python(script, &moto.endpoint, &[]);
    let data = folder();
    let mut settings = dynamodb_settings(local(), data.path());
    // The address is not treated as local, so that the credentials and the region are read from a profile.
    let remote = format!("dynamodb.endpoint={}", local().replace("127.0.0.1", "127.0.0.2"));
    let objects = [
        "dynamodb.object_store_url=s3://large/streamer",
        "limits.max_payload_bytes=16777216",
        &remote,
    ];
    settings.extend(objects.map(str::to_owned));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let profile = data.path().join("profile");
    let text = "[default]\nregion = us-east-1\naws_access_key_id = local\n\
        aws_secret_access_key = local\n";
    std::fs::write(&profile, text).unwrap();
    let profile = profile.to_str().unwrap().to_owned();
    let environment = [
        ("AWS_CONFIG_FILE", profile.as_str()),
        ("AWS_ENDPOINT_URL", &moto.endpoint),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    let mut server = Server::start_with(data, &settings, &environment);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("ten", "echo_async", large(10_000_000)).await;
    client.follow(Log::after(1)).await;
    server.kill_and_restart();
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let request = client.request(json!({"type": "get", "request_id": "ten"})).await;
    assert_eq!(request["result"].as_str().unwrap().len(), 10_000_000);
    let script = "o = client('s3').list_objects_v2(Bucket='large')['Contents']\n\
        assert len(o) == 2 and all(x['Key'].startswith('streamer/') for x in o), o\n";
    python(script, &moto.endpoint, &[]);
}

#[tokio::test]
async fn without_an_object_store_large_values_are_rejected() {
    let server = server(local(), &["dynamodb.object_store_url="]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let message = json!({"id": "big", "action": "echo_async", "payload": large(340_000)});
    let rejected = client.request(message).await;
    let text = rejected["error"]["message"].as_str().unwrap();
    let rule =
        "must be at most 327680 bytes (store.engine dynamodb without dynamodb.object_store_url)";
    assert!(text.contains(rule), "{rejected}");
    // Smaller values require no object store.
    client.submit("fits", "echo_async", large(300_000)).await;
    let log = client.follow(Log::after(1)).await;
    let result = log.events.last().unwrap()["result"].as_str().unwrap();
    assert_eq!(result.len(), 300_000);
}

#[tokio::test]
async fn ended_requests_expire_with_all_their_items() {
    let server = server(local(), &["dynamodb.retention=24h"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let payload = json!({"steps": 40, "output_chunks": 20, "chunk_bytes": 400, "delay_ms": 1});
    client.submit("kept", "echo_async", payload).await;
    client.follow(Log::after(1)).await;
    let settings = server.settings();
    let prefix = settings.iter().find_map(|s| s.strip_prefix("dynamodb.table_prefix=")).unwrap();
    // The expiry of a request is set when it ends; the expiry of its parts is set in the background.
    let script = "c = client('dynamodb'); p = sys.argv[2]\n\
        rows = lambda t: c.scan(TableName=p + t)['Items']\n\
        request = rows('requests')[0]\n\
        ended = int(request['finish_time']['N']) // 1000\n\
        assert int(request['remove_after']['N']) - ended == 24 * 3600, request\n\
        while any('remove_after' not in r for r in rows('parts') + rows('names')): pass\n\
        assert len(rows('parts')) > 0 and len(rows('names')) == 1\n\
        for r in rows('parts') + rows('names'):\n    \
        assert int(r['remove_after']['N']) - ended == 8 * 24 * 3600, r\n";
    python(script, local(), &[prefix]);
}

#[tokio::test]
async fn hints_stream_and_polling_each_suffice() {
    let switches = |hints: bool, stream: bool, poll: bool| {
        [
            format!("execution.push_notifications={hints}"),
            format!("dynamodb.streams_enabled={stream}"),
            format!("execution.queue_polling={poll}"),
        ]
    };
    for implementation in [Implementation::DynamoDbLocal, Implementation::Dynoxide] {
        for on in [[true, false, false], [false, true, false], [false, false, true]] {
            let settings = switches(on[0], on[1], on[2]);
            let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
            let server = server(endpoint(implementation), &settings);
            let token = server.token("acme", "ann", &[]);
            let mut client = Client::connect(&server.url, &token).await;
            for id in ["one", "two"] {
                client.submit(id, "echo_async", json!({"steps": 2})).await;
                let log = client.follow(Log::after(1)).await;
                assert_eq!(log.last_type(), "complete", "hints, stream, polling: {on:?}");
            }
        }
    }
}

#[tokio::test]
async fn requests_that_an_earlier_version_has_queued_are_executed() {
    let mut server = server(local(), &[]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    for id in ["ready", "delayed"] {
        let submission = json!({"id": id, "action": "echo_async", "delay_ms": 3_600_000});
        client.request(submission).await;
    }
    server.stop();
    let settings = server.settings();
    let prefix = settings.iter().find_map(|s| s.strip_prefix("dynamodb.table_prefix=")).unwrap();
    // The rank began with the tenant, and the partition had no prefix, also for delayed requests.
    let script = "c = client('dynamodb'); t = sys.argv[2] + 'requests'\n\
        for r in c.scan(TableName=t)['Items']:\n    \
        uid, shard = r['uid'], r['queue_shard']['S']\n    \
        assert shard[0] == 'd' and 'delay_shard' in r, r\n    \
        delayed = r['client_id']['S'] == 'delayed'\n    \
        due = int(r['not_before']['N']) - (3598_000 if delayed else 3601_000)\n    \
        rank = 'acme\\techo_async\\t9\\t%015d\\t%s' % (due, uid['S'])\n    \
        change = 'SET queue_shard=:s, queue_rank=:r, not_before=:d'\n    \
        values = {':s': {'S': shard[1:]}, ':r': {'S': rank}, ':d': {'N': str(due)}}\n    \
        change += ', delay_until=:d' if delayed else ' REMOVE delay_shard, delay_until'\n    \
        c.update_item(TableName=t, Key={'uid': uid}, UpdateExpression=change, ExpressionAttributeValues=values)\n";
    python(script, local(), &[prefix]);
    server.restart();
    let mut client = Client::connect(&server.url, &token).await;
    for id in ["ready", "delayed"] {
        client.send(json!({"type": "subscribe", "request_id": id, "after_seq": 1})).await;
        assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_continues_after_shards_are_split_and_records_trimmed() {
    let streams = Resharding::start(local()).await;
    let settings = ["execution.push_notifications=false", "execution.queue_polling=false"];
    let mut first = server(&streams.endpoint, &settings);
    first.share_store();
    let mut client = Client::connect(&first.url, &first.token("acme", "ann", &[])).await;
    let mut count = 0;
    run_one(&mut client, &mut count).await;
    streams.split();
    while !streams.all_shards_read() {
        run_one(&mut client, &mut count).await;
    }
    streams.expire_iterator();
    while !streams.all_exceptions_returned() {
        run_one(&mut client, &mut count).await;
    }
    streams.trim_records();
    while !streams.all_exceptions_returned() {
        run_one(&mut client, &mut count).await;
    }
    for _ in 0..4 {
        run_one(&mut client, &mut count).await;
    }

    // A second server receives its share of the shards.
    let shared: Vec<&str> = first.settings().iter().map(String::as_str).collect();
    let _second = Server::start_in(folder(), &shared);
    let prefix = shared.iter().find_map(|s| s.strip_prefix("dynamodb.table_prefix=")).unwrap();
    let script = "c = client('dynamodb')\n\
        def holders():\n    \
        k = {'TableName': sys.argv[2] + 'fleet', 'KeyConditionExpression': 'kind = :k', \
        'ExpressionAttributeValues': {':k': {'S': 'shard'}}}\n    \
        return {r['holder']['S'] for r in c.query(**k)['Items'] if 'ended' not in r}\n\
        while len(holders()) < 2: pass\n";
    python(script, local(), &[prefix]);
    for _ in 0..4 {
        run_one(&mut client, &mut count).await;
    }
}

/// Submits a new request and follows it to the terminal event.
async fn run_one(client: &mut Client, count: &mut usize) {
    *count += 1;
    client.submit(&format!("n{count}"), "echo_async", json!({"steps": 1})).await;
    assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
}

#[test]
fn a_separate_service_reports_missing_options() {
    let data = folder();
    let error = |service: &str, settings: &[&str]| {
        let mut command = Process::command(binary());
        command.args([service, "--listen", "127.0.0.1:0", "--data"]).arg(data.path());
        for setting in settings {
            command.args(["--set", setting]);
        }
        let output = Process::output(command.env_clear().current_dir(data.path()));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        lines(&output.stderr).join("\n")
    };
    let engine = "store.engine=dynamodb";
    assert!(error("router", &[]).contains("store.engine: must be dynamodb"));
    assert!(error("gateway", &[engine]).contains("peers.router: is required"));
    assert!(error("processor", &[engine]).contains("peers.progress: is required"));
    let all = "auth.allow_dev_key_on_public_address=true";
    let open = ["server.listen=0.0.0.0:0", engine, all, "peers.progress=http://127.0.0.1:1"];
    let mut command = Process::command(binary());
    command.args(["processor", "--data"]).arg(data.path());
    for setting in open {
        command.args(["--set", setting]);
    }
    let output = Process::output(command.env_clear().current_dir(data.path()));
    let text = lines(&output.stderr).join("\n");
    assert!(text.contains("peers.shared_secret_file: is required"), "{text}");
}
