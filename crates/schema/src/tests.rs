use std::cell::Cell;

use jsonschema::{Keyword, PatternOptions, ValidationError, Validator};
use serde_json::{Value, json};

use super::{
    MAX_STEPS, PayloadSchema, Pool, SchemaError,
    cost::{Bound, Shape},
    graph::Graph,
};

thread_local! {
    static VISITS: Cell<u64> = const { Cell::new(0) };
}

/// Keyword that counts the applications of the subschemas that contain it.
struct Count;

impl<'i> Keyword<'i> for Count {
    fn validate(&self, _: &'i Value) -> Result<(), ValidationError<'i>> {
        VISITS.set(VISITS.get() + 1);
        Ok(())
    }

    fn is_valid(&self, _: &'i Value) -> bool {
        VISITS.set(VISITS.get() + 1);
        true
    }
}

fn counting(schema: &Value) -> Validator {
    jsonschema::options()
        .with_keyword("x-count", |_, _, _| Ok(Box::new(Count)))
        .with_pattern_options(PatternOptions::regex())
        .build(schema)
        .unwrap_or_else(|error| panic!("{error}: {schema}"))
}

fn compile(schema: &Value) -> Result<PayloadSchema, SchemaError> {
    PayloadSchema::compile(&schema.to_string())
}

fn rejection(schema: &Value) -> String {
    match compile(schema) {
        Ok(_) => panic!("accepted: {schema}"),
        Err(error) => error.to_string(),
    }
}

fn mismatches(schema: &Value, payload: &Value) -> Vec<(String, String)> {
    let schema = compile(schema).unwrap();
    let measured = match schema.measure(payload.to_string().as_bytes()) {
        Ok(measured) => measured,
        Err(mismatch) => return vec![(mismatch.path, mismatch.rule)],
    };
    schema.validate(&measured).into_iter().map(|found| (found.path, found.rule)).collect()
}

/// Returns a chain of references for one value whose last subschema applies the first one to items.
fn chain(length: usize) -> Value {
    let mut definitions = serde_json::Map::new();
    for step in 0..length {
        let next = json!({ "allOf": [{ "$ref": format!("#/$defs/d{}", step + 1) }] });
        definitions.insert(format!("d{step}"), next);
    }
    definitions.insert(format!("d{length}"), json!({ "items": { "$ref": "#" } }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

#[test]
fn a_schema_that_would_overflow_the_stack_is_rejected() {
    let rule = rejection(&chain(20));
    assert!(rule.contains("passes more than 2048 subschemas"), "{rule}");
    let deep = json!({ "x": { "items": { "$ref": "#/x" } }, "$ref": "#/x" });
    assert!(compile(&deep).is_ok());
}

#[test]
fn exponential_expansion_for_the_same_value_is_rejected() {
    let mut definitions = serde_json::Map::new();
    for step in 0..24 {
        let next = json!({ "$ref": format!("#/$defs/d{}", step + 1) });
        definitions.insert(format!("d{step}"), json!({ "allOf": [next, next] }));
    }
    definitions.insert("d24".into(), json!({ "type": "object" }));
    let schema = json!({ "$ref": "#/$defs/d0", "$defs": definitions });
    assert!(rejection(&schema).contains("too many subschemas to the same value"));
}

#[test]
fn recursion_along_many_paths_is_rejected_at_compilation() {
    let item = json!({ "items": { "$ref": "#" } });
    let schema = json!({ "anyOf": [item, item, item, item, item] });
    let rule = rejection(&schema);
    assert!(rule.contains("steps for one value nested"), "{rule}");
}

#[test]
fn recursion_along_two_paths_accepts_payloads_of_limited_depth() {
    let binary = |op: &str| {
        let operand = json!({ "$ref": "#" });
        json!({
            "type": "object",
            "properties": { "op": { "const": op }, "left": operand, "right": operand },
            "required": ["op", "left", "right"],
        })
    };
    let schema = json!({ "oneOf": [{ "type": "number" }, binary("add"), binary("multiply")] });
    let nested = |depth: usize| {
        (0..depth).fold(json!(1), |left, _| json!({ "op": "add", "left": left, "right": 2 }))
    };
    assert_eq!(mismatches(&schema, &nested(10)), []);
    let [(path, rule)] = &mismatches(&schema, &nested(60))[..] else { panic!("one mismatch") };
    assert_eq!(path, "");
    assert!(rule.contains("nested too deep for the schema"), "{rule}");
}

#[test]
fn endless_references_are_rejected() {
    for schema in [
        json!({ "$ref": "#" }),
        json!({ "anyOf": [{ "type": "string" }, { "$ref": "#" }] }),
        json!({ "$defs": { "a": { "not": { "$ref": "#/$defs/b" } }, "b": { "$ref": "#/$defs/a" } },
                "items": { "$ref": "#/$defs/a" } }),
    ] {
        assert!(rejection(&schema).contains("without end"));
    }
}

#[test]
fn references_outside_the_document_are_rejected() {
    for reference in ["other.json", "http://localhost/a", "#anchor", "#/$defs/missing", "file:///"]
    {
        let rule = rejection(&json!({ "$ref": reference }));
        assert!(rule.contains("is not '#' or '#/…'"), "{rule}");
    }
    for schema in [
        json!({ "properties": { "a": { "$id": "http://localhost/a" } } }),
        json!({ "$ref": "#/$defs/a/items", "$defs": { "a": { "$id": "b", "items": true } } }),
        json!({ "$schema": "http://json-schema.org/draft-04/schema#", "items": { "id": "a" } }),
        json!({ "$dynamicRef": "#a" }),
        json!({ "items": { "$recursiveRef": "#" } }),
    ] {
        assert!(rejection(&schema).contains("which is not supported"));
    }
    let rule = rejection(&json!({ "$schema": "http://localhost/draft" }));
    assert!(rule.contains("is not one of the drafts"), "{rule}");
}

#[test]
fn the_size_of_patterns_is_limited() {
    for (pattern, rule) in [
        ("(", "is not a regular expression"),
        ("a(?=b)", "has look-around"),
        ("(?<!b)a", "has look-around"),
        ("(?i:\\p{L})", "has flags in a group"),
        (&*"\\p{L}".repeat(65), "Unicode classes"),
        (&*"a".repeat(3000), "2048 are allowed"),
        ("(\\p{L}{100}){100}", "when compiled"),
    ] {
        for schema in
            [json!({ "pattern": pattern }), json!({ "patternProperties": { pattern: {} } })]
        {
            let found = rejection(&schema);
            assert!(found.contains(rule), "{pattern}: {found}");
        }
    }
    let many: serde_json::Map<String, Value> =
        (0..500).map(|n| (format!("^a{n}$"), json!({}))).collect();
    assert_eq!(mismatches(&json!({ "patternProperties": many }), &json!({ "a7": 1 })), []);
    let large: serde_json::Map<String, Value> =
        (0..9).map(|n| (format!("{}{n}", "a".repeat(2000)), json!({}))).collect();
    assert!(
        rejection(&json!({ "patternProperties": large })).contains("those before it are longer")
    );
    let large: serde_json::Map<String, Value> =
        (0..100).map(|n| (format!("(a?){{500}}{n}"), json!({}))).collect();
    assert!(rejection(&json!({ "patternProperties": large })).contains("those before it take"));
    let groups = json!({ "pattern": r"^(?:a|(?<name>b))[(?i]\(\?$" });
    assert_eq!(mismatches(&groups, &json!("b?(?")), []);
    assert_eq!(mismatches(&json!({ "pattern": "^[\\w.-]{1,64}$" }), &json!("a.b-c")), []);
}

#[test]
fn a_payload_that_takes_too_many_steps_is_rejected() {
    let many: Vec<u32> = (0..20_000).collect();
    let schema = json!({ "items": { "enum": many } });
    let payload = json!(vec![30_000; 100_000]);
    let [(_, rule)] = &mismatches(&schema, &payload)[..] else { panic!("one mismatch") };
    assert!(rule.contains(&format!("{MAX_STEPS} are allowed")), "{rule}");
    assert_eq!(mismatches(&schema, &json!(many[..900])), []);
}

#[test]
fn violations_are_located_and_their_number_is_limited() {
    let schema = json!({ "properties": { "rows": { "items": { "type": "integer" } } } });
    let found = mismatches(&schema, &json!({ "rows": [1, "a", 2, "b"] }));
    let paths: Vec<&str> = found.iter().map(|(path, _)| &**path).collect();
    assert_eq!(paths, ["/rows/1", "/rows/3"]);
    let found = mismatches(&schema, &json!({ "rows": vec!["a"; 1000] }));
    assert_eq!(found.len(), 50);
    let [(_, rule)] = &mismatches(&schema, &json!({ "rows": vec!["a"; 200_000] }))[..] else {
        panic!("one mismatch")
    };
    assert!(rule.contains("too large to locate the violations"), "{rule}");
}

/// Schemas as generated by `zod` and `pydantic` or written by hand.
#[test]
fn common_schemas_are_accepted() {
    let any_json = json!({ "anyOf": [
        { "type": ["string", "number", "boolean", "null"] },
        { "type": "array", "items": { "$ref": "#/definitions/json" } },
        { "type": "object", "additionalProperties": { "$ref": "#/definitions/json" } },
    ] });
    let draft_7 = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": { "json": any_json },
        "type": "object",
        "properties": { "id": { "type": "string", "format": "uuid" }, "value": { "$ref": "#/definitions/json" } },
        "additionalProperties": false,
    });
    let nested = (0..60).fold(json!([1]), |inner, _| json!({ "a": [inner] }));
    assert_eq!(mismatches(&draft_7, &json!({ "id": "no uuid", "value": nested })), []);
    let tree = json!({
        "$defs": { "Node": {
            "properties": {
                "name": { "type": "string", "minLength": 1 },
                "left": { "anyOf": [{ "$ref": "#/$defs/Node" }, { "type": "null" }] },
                "right": { "anyOf": [{ "$ref": "#/$defs/Node" }, { "type": "null" }] },
            },
            "required": ["name"],
            "additionalProperties": { "$ref": "#/$defs/Node" },
        } },
        "$ref": "#/$defs/Node",
    });
    let nested = (0..100).fold(json!(null), |left, _| json!({ "name": "a", "left": left }));
    assert_eq!(mismatches(&tree, &nested), []);
    let union: Vec<Value> = (0..100)
        .map(|kind| json!({
            "properties": { "kind": { "const": format!("kind {kind}") }, "n": { "type": "integer" } },
            "required": ["kind"],
            "unevaluatedProperties": false,
        }))
        .collect();
    assert_eq!(mismatches(&json!({ "oneOf": union }), &json!({ "kind": "kind 7", "n": 1 })), []);
}

/// Reproducible pseudorandom numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn name(&mut self) -> String {
        ["a", "b", "c"][usize::try_from(self.below(3)).unwrap()].to_owned()
    }

    /// Returns a counting subschema with nested subschemas up to the given depth.
    fn schema(&mut self, depth: u64) -> Value {
        if self.below(3) == 0 {
            return json!({ "x-count": true, "$ref": format!("#/$defs/{}", self.name()) });
        }
        let mut schema = json!({ "x-count": true });
        if depth == 0 {
            let kinds = ["object", "array", "integer", "string"];
            if self.below(2) == 0 {
                schema["type"] = json!(kinds[usize::try_from(self.below(4)).unwrap()]);
            }
            return schema;
        }
        for _ in 0..=self.below(3) {
            let one = self.schema(depth - 1);
            match self.below(19) {
                0 => schema["allOf"] = json!([one, self.schema(depth - 1)]),
                1 => schema["anyOf"] = json!([one, self.schema(depth - 1)]),
                2 => schema["oneOf"] = json!([one, self.schema(depth - 1)]),
                3 => schema["not"] = one,
                4 => {
                    schema["if"] = one;
                    schema["then"] = self.schema(depth - 1);
                    schema["else"] = self.schema(depth - 1);
                }
                5 | 6 => {
                    schema["properties"] = json!({ self.name(): one, "d": self.schema(depth - 1) });
                }
                7 => schema["patternProperties"] = json!({ format!("^{}", self.name()): one }),
                8 => schema["additionalProperties"] = one,
                9 => schema["propertyNames"] = one,
                10 | 11 => schema["items"] = one,
                12 => schema["prefixItems"] = json!([one, self.schema(depth - 1)]),
                13 => schema["contains"] = one,
                14 => schema["unevaluatedProperties"] = one,
                15 => schema["unevaluatedItems"] = one,
                16 if self.below(3) == 0 => schema["uniqueItems"] = json!(true),
                16 => schema["dependentSchemas"] = json!({ self.name(): one }),
                17 => schema["unevaluatedProperties"] = json!(false),
                _ => schema["minContains"] = json!(self.below(3)),
            }
        }
        schema
    }

    fn payload(&mut self, depth: u64) -> Value {
        match self.below(if depth == 0 { 2 } else { 8 }) {
            0 => json!(1),
            1 => json!("a"),
            2..5 => (0..self.below(4)).map(|_| self.payload(depth - 1)).collect(),
            _ => {
                let mut members = serde_json::Map::new();
                for _ in 0..self.below(4) {
                    members.insert(self.name(), self.payload(depth - 1));
                }
                members.into()
            }
        }
    }
}

#[test]
fn no_validation_exceeds_its_bound() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut pairs, mut invalid, mut nearest) = (0, 0, 0.0_f64);
    while pairs < 10_000 {
        let mut schema = random.schema(3);
        if schema.get("$ref").is_none() && random.below(2) == 0 {
            schema["$ref"] = json!("#/$defs/a");
        }
        schema["$defs"] = json!({
            "a": random.schema(2), "b": random.schema(2), "c": random.schema(1),
        });
        let Ok(graph) = Graph::read(&schema) else { panic!("not read: {schema}") };
        let Ok(bound) = Bound::of(&graph) else { continue };
        let validator = counting(&schema);
        for _ in 0..5 {
            let payload = random.payload(5);
            let shape = Shape::of(&payload);
            let (to_decide, to_explain) =
                (bound.steps_to_decide(&shape), bound.steps_to_explain(&shape));
            if to_explain > 1_000_000 {
                continue;
            }
            VISITS.set(0);
            let is_valid = validator.is_valid(&payload);
            let decided = VISITS.replace(0);
            assert!(decided <= to_decide, "{decided} > {to_decide}: {schema} {payload}");
            let violations = validator.iter_errors(&payload).count();
            let explained = VISITS.get();
            assert!(explained <= to_explain, "{explained} > {to_explain}: {schema} {payload}");
            assert_eq!(is_valid, violations == 0);
            #[allow(clippy::cast_precision_loss)]
            let share = decided as f64 / to_decide as f64;
            nearest = nearest.max(share);
            invalid += u32::from(!is_valid);
            pairs += 1;
        }
    }
    // Both outcomes occur, and the bound is not far above the measured maximum.
    assert!(invalid > 1000 && invalid < 9000, "{invalid}");
    assert!(nearest > 0.3, "{nearest}");
}

#[tokio::test]
async fn the_deepest_recursion_fits_the_stack_of_the_pool() {
    let (pool, mut accepted) = (Pool::new(1), 0);
    for length in 0..20 {
        let mut schema = chain(length);
        schema["$defs"][format!("d{length}")]["type"] = json!(["array", "string"]);
        let run = move || {
            let schema = compile(&schema).ok()?;
            let found = [(30, "1"), (126, "1"), (126, "")].map(|(depth, innermost)| {
                let nested = format!("{}{innermost}{}", "[".repeat(depth), "]".repeat(depth));
                schema.measure(nested.as_bytes()).map(|measured| schema.validate(&measured).len())
            });
            Some(found)
        };
        if let Some(found) = pool.run("tenant", run).await.unwrap() {
            assert_eq!(found, [Ok(1), Ok(1), Ok(0)]);
            accepted = length;
        }
    }
    assert!((5..20).contains(&accepted), "{accepted}");
}

#[test]
fn unique_items_takes_proportional_time() {
    let trees: Vec<Value> = (0..150).map(|size| json!(vec![json!([]); size % 100])).collect();
    let schema = json!({ "uniqueItems": true });
    let [(path, rule)] = &mismatches(&schema, &json!(trees))[..] else { panic!("one mismatch") };
    assert_eq!((&**path, &**rule), ("", "has items that are not unique"));
    assert_eq!(mismatches(&schema, &json!(trees[..100])), []);
    assert_eq!(mismatches(&json!({ "uniqueItems": false }), &json!([1, 1])), []);
}

#[test]
fn the_number_of_names_copied_for_each_path_is_limited() {
    let properties: serde_json::Map<String, Value> =
        (0..4500).map(|n| (format!("p{n}"), json!(true))).collect();
    let references = vec![json!({ "$ref": "#/$defs/D" }); 500];
    let schema = json!({
        "$defs": { "D": { "properties": properties }, "G": { "anyOf": references } },
        "allOf": [{ "$ref": "#/$defs/G" }],
        "unevaluatedProperties": false,
    });
    assert!(rejection(&schema).contains("applies too many subschemas"));
}

#[test]
fn a_long_name_above_many_subschemas_is_rejected() {
    let below = |count: usize| -> Value {
        let entries = (0..count).map(|n| (n.to_string(), json!({ "type": "string" })));
        json!({ "properties": entries.collect::<serde_json::Map<_, _>>() })
    };
    let below_long_name =
        |length: usize, count| json!({ "properties": { "n".repeat(length): below(count) } });
    // These 200 kB would take 1.2 GB once compiled.
    for schema in [
        below_long_name(100_000, 4000),
        json!({ "$defs": { "n".repeat(100_000): below(4000) } }),
        json!({ "properties": { "n".repeat(100_000): { "dependentRequired":
            (0..1000).map(|n| (n.to_string(), json!(["a"]))).collect::<serde_json::Map<_, _>>() } } }),
    ] {
        let rule = rejection(&schema);
        assert!(rule.contains("longer than 16777216 bytes in total"), "{rule}");
    }
    for schema in [below_long_name(1000, 1000), below_long_name(100_000, 10), below(9000)] {
        assert!(compile(&schema).is_ok());
    }
}
