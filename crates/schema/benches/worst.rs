//! Measures the longest validations among the most expensive accepted schemas and payloads.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value, json};
use streamer_schema::{PayloadSchema, Pool};

fn main() {
    let worker = std::thread::Builder::new().stack_size(64 << 20).spawn(|| {
        for (name, schema, payload) in cases() {
            run(name, &schema, &payload);
        }
    });
    worker.expect("the thread starts").join().expect("no case panics");
}

fn run(name: &str, schema: &Value, payload: &dyn Fn(usize) -> Value) {
    let text = schema.to_string();
    let start = Instant::now();
    let schema = match PayloadSchema::compile(&text) {
        Ok(schema) => Arc::new(schema),
        Err(error) => {
            println!("{name:32} rejected in {:.1?}: {error}", start.elapsed());
            return;
        }
    };
    let compiled = start.elapsed();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let (runtime, pool) = (runtime.expect("the runtime starts"), Pool::new(1));
    let (mut worst, mut at) = (Duration::ZERO, 0);
    let mut size = 1;
    while size < 1 << 20 {
        let payload = payload(size).to_string();
        if payload.len() > 1 << 20 {
            break;
        }
        let payload = Bytes::from(payload);
        let start = Instant::now();
        let _ = runtime.block_on(schema.check(&payload, &pool, "tenant"));
        if start.elapsed() > worst {
            (worst, at) = (start.elapsed(), payload.len());
        }
        size = size * 5 / 4 + 1;
    }
    println!(
        "{name:32} compiled in {compiled:9.1?} from {:6} bytes, worst {worst:9.1?} for {at:7} bytes",
        text.len()
    );
}

type Case = (&'static str, Value, Box<dyn Fn(usize) -> Value>);

fn cases() -> Vec<Case> {
    let numbers = |n: usize| json!(vec![1_000_000; n]);
    let many: Vec<usize> = (0..20_000).collect();
    let alternatives = |schema: Value, count: usize| -> Value {
        json!({ "items": { "anyOf": vec![schema; count] } })
    };
    let definitions: serde_json::Map<String, Value> =
        (0..5000).map(|n| (format!("d{n}"), json!({ "type": "string" }))).collect();
    let properties: serde_json::Map<String, Value> =
        (0..2000).map(|n| (format!("p{n}"), json!({ "type": "string" }))).collect();
    let object = move |n: usize| -> Value {
        Value::Object((0..n).map(|n| (format!("p{n}"), json!("a"))).collect())
    };
    let text = |n: usize| json!(format!("{}b", "a".repeat(n)));
    let evaluated: Vec<Value> = (0..30)
        .map(|n| json!({ "if": { "required": [format!("x{n}")] }, "then": { "properties": { format!("p{n}"): {} } } }))
        .collect();
    let tree = json!({ "properties": { "a": { "$ref": "#" } }, "anyOf": [{ "type": "object" }, { "type": "null" }], "uniqueItems": true, "items": { "$ref": "#" } });
    let nested_items = move |n: usize| (0..120).fold(numbers(n), |inner, _| json!([inner]));
    vec![
        ("enum", json!({ "items": { "enum": many } }), Box::new(numbers)),
        ("anyOf of 1000 types", alternatives(json!({ "type": "string" }), 1000), Box::new(numbers)),
        (
            "anyOf of 1000 objects",
            alternatives(
                json!({ "required": ["a"], "properties": { "a": { "type": "string" } } }),
                1000,
            ),
            Box::new(|n| json!(vec![json!({ "b": 1 }); n])),
        ),
        (
            "5000 definitions",
            json!({ "$defs": definitions, "items": { "type": "string" } }),
            Box::new(numbers),
        ),
        (
            "2000 properties",
            json!({ "properties": properties.clone(), "required": ["q"] }),
            Box::new(object),
        ),
        (
            "2000 properties, unevaluated",
            json!({ "properties": properties, "unevaluatedProperties": { "type": "number" } }),
            Box::new(object),
        ),
        (
            "30 conditions, unevaluated",
            json!({ "allOf": evaluated, "unevaluatedProperties": { "type": "string" } }),
            Box::new(object),
        ),
        ("unique nested", tree, Box::new(nested_items)),
        (
            "unique numbers",
            json!({ "uniqueItems": true }),
            Box::new(|n| json!((0..n).collect::<Vec<_>>())),
        ),
        ("pattern [ab]*a[ab]{100}c", json!({ "pattern": "[ab]*a[ab]{100}c" }), Box::new(text)),
        ("pattern (a?){200}a{200}", json!({ "pattern": "^(a?){200}a{200}$" }), Box::new(text)),
        ("pattern .*a.{800}c", json!({ "pattern": "(.*)a(.|b){800}c" }), Box::new(text)),
        ("pattern (x+x+)+y", json!({ "pattern": "(a+a+)+y" }), Box::new(text)),
        ("pattern \\p{L}{1,40}", json!({ "pattern": "\\p{L}{1,40}c\\d" }), Box::new(text)),
        (
            "100 patterns",
            json!({ "patternProperties": (0..100).map(|n| (format!("[ab]*a[ab]{{{}}}{n}", n % 10), json!({}))).collect::<serde_json::Map<_, _>>() }),
            Box::new(object),
        ),
        (
            "250 KB of anyOf",
            json!({ "anyOf": vec![json!({ "properties": { "a": { "items": { "type": "string", "enum": [1, 2, 3] } } } }); 3300] }),
            Box::new(numbers),
        ),
        ("250 KB of enum", json!({ "enum": (0..36_000).collect::<Vec<_>>() }), Box::new(numbers)),
        (
            "union of 100, 50 references",
            json!({ "$defs": { "u": { "oneOf": vec![json!({ "$ref": "#/$defs/v" }); 100] }, "v": { "allOf": [{}, {}, {}] } }, "properties": (0..50).map(|n| (format!("p{n}"), json!({ "$ref": "#/$defs/u" }))).collect::<serde_json::Map<_, _>>() }),
            Box::new(object),
        ),
        (
            "recursion with unevaluated",
            json!({ "$defs": { "n": { "properties": { "a": { "$ref": "#/$defs/n" } }, "items": { "$ref": "#/$defs/n" }, "unevaluatedProperties": false } }, "$ref": "#/$defs/n" }),
            Box::new(|n| json!(vec![(0..60).fold(json!({}), |inner, _| json!({ "a": inner })); n])),
        ),
        (
            "anyOf recursion",
            json!({ "anyOf": [{ "type": ["number", "string"] }, { "items": { "$ref": "#" } }, { "type": "object", "additionalProperties": { "$ref": "#" } }] }),
            Box::new(|n| json!(vec![(0..100).fold(json!(null), |inner, _| json!([inner])); n])),
        ),
    ]
}
