//! Graph of a schema: its subschemas, and the parts of a value to which each subschema applies others.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::{SchemaError, pattern::Patterns};

/// Maximum number of subschemas of a schema; each uses some hundred bytes when compiled.
const MAX_SUBSCHEMAS: usize = 10_000;
/// Maximum total size of the locations of all subschemas and their keywords, in bytes: the validator stores each
/// location, and a long property name is part of every location below it.
const MAX_LOCATION_BYTES: u64 = 16 << 20;
/// Number of sixteenths of a step for each byte of a string whose content is decoded and parsed.
const CONTENT_BYTE_COST: u64 = 16;
/// Supported drafts.
const DRAFTS: [&str; 5] = [
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
];

/// Part of a value that an edge leads to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Part {
    /// The value itself.
    Same,
    /// The value itself, to choose between two other subschemas.
    Condition,
    /// The property with the given name; names are numbered.
    Property(u32),
    /// Any property, or the name of any property.
    AnyProperty,
    /// Any property that the same subschema does not name.
    OtherProperties,
    /// The item at the given index.
    Item(u32),
    /// Any item.
    AnyItem,
    /// Any item at an index for which the same subschema has no separate subschema.
    OtherItems,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Edge {
    pub(crate) to: usize,
    pub(crate) part: Part,
    /// Whether the edge is also followed to determine which properties or items were evaluated.
    pub(crate) marks: bool,
}

/// Subschema of a schema. Costs are in steps; see [`crate::cost`].
#[derive(Default, Debug)]
pub(crate) struct Node {
    /// JSON Pointer of the subschema.
    pub(crate) location: String,
    /// Number of steps for each value to which the subschema is applied.
    pub(crate) steps: u64,
    /// Number of sixteenths of a step for each byte of a string.
    pub(crate) byte_cost: u64,
    /// Number of steps for each property of an object.
    pub(crate) property_steps: u64,
    /// Number of sixteenths of a step for each byte of a property name.
    pub(crate) name_byte_cost: u64,
    /// Whether the subschema reads everything below the value (`uniqueItems`).
    pub(crate) reads_all: bool,
    /// Whether the subschema has `unevaluatedProperties` or `unevaluatedItems`.
    pub(crate) unevaluated: bool,
    pub(crate) edges: Vec<Edge>,
}

/// Subschemas of a schema; the first one is the schema itself.
pub(crate) struct Graph {
    pub(crate) nodes: Vec<Node>,
}

impl Graph {
    /// Reads a schema; rejects a schema whose cost has no bound.
    pub(crate) fn read(schema: &Value) -> Result<Self, SchemaError> {
        if let Some(draft) = schema.get("$schema") {
            let known = draft.as_str().is_some_and(|d| DRAFTS.contains(&d.trim_end_matches('#')));
            if !known {
                return Err(SchemaError::UnknownDraft(draft.to_string()));
            }
        }
        let mut reader = Reader {
            root: schema,
            is_draft_4: schema["$schema"].as_str().is_some_and(|draft| draft.contains("draft-04")),
            nodes: Vec::new(),
            by_address: HashMap::new(),
            names: HashMap::new(),
            unread: Vec::new(),
            location_bytes: 0,
            patterns: Patterns::default(),
        };
        reader.node(schema, String::new())?;
        while let Some((index, value)) = reader.unread.pop() {
            if let Value::Object(keywords) = value {
                reader.read_keywords(index, keywords)?;
            }
        }
        Ok(Self { nodes: reader.nodes })
    }
}

struct Reader<'a> {
    root: &'a Value,
    is_draft_4: bool,
    nodes: Vec<Node>,
    /// Nodes by the address of the subschema, which does not change during the read.
    by_address: HashMap<*const Value, usize>,
    names: HashMap<&'a str, u32>,
    unread: Vec<(usize, &'a Value)>,
    location_bytes: u64,
    patterns: Patterns,
}

impl<'a> Reader<'a> {
    fn node(&mut self, value: &'a Value, location: String) -> Result<usize, SchemaError> {
        if let Some(index) = self.by_address.get(&std::ptr::from_ref(value)) {
            return Ok(*index);
        }
        let index = self.nodes.len();
        if index >= MAX_SUBSCHEMAS {
            return Err(SchemaError::TooManySubschemas { max: MAX_SUBSCHEMAS });
        }
        self.count_locations(&location, 1)?;
        self.by_address.insert(value, index);
        self.nodes.push(Node { location, steps: 1, ..Node::default() });
        self.unread.push((index, value));
        Ok(index)
    }

    fn read_keywords(
        &mut self,
        index: usize,
        keywords: &'a Map<String, Value>,
    ) -> Result<(), SchemaError> {
        let location = self.nodes[index].location.clone();
        if index != 0 {
            // Draft 4 uses `id` for `$id`; in other drafts `id` is not a keyword.
            let id = if self.is_draft_4 { "id" } else { "$id" };
            for keyword in [id, "$schema"] {
                if keywords.get(keyword).is_some_and(Value::is_string) {
                    return Err(SchemaError::unsupported(&location, keyword));
                }
            }
        }
        for (keyword, value) in keywords {
            let at = KeywordLocation { index, location: &location, keyword };
            self.read_keyword(&at, value, keywords)?;
        }
        let node = &mut self.nodes[index];
        node.steps += keywords.len() as u64;
        let steps = node.steps;
        self.count_locations(&location, steps)
    }

    fn count_locations(&mut self, location: &str, count: u64) -> Result<(), SchemaError> {
        self.location_bytes = self.location_bytes.saturating_add(location.len() as u64 * count);
        if self.location_bytes > MAX_LOCATION_BYTES {
            return Err(SchemaError::TooLongLocations { max: MAX_LOCATION_BYTES });
        }
        Ok(())
    }

    fn read_keyword(
        &mut self,
        at: &KeywordLocation<'_>,
        value: &'a Value,
        keywords: &'a Map<String, Value>,
    ) -> Result<(), SchemaError> {
        let node = at.index;
        match at.keyword {
            "allOf" | "anyOf" | "oneOf" => self.list(at, value, |_| Part::Same)?,
            "not" | "then" | "else" => self.one(at, value, Part::Same)?,
            "if" => self.one(at, value, Part::Condition)?,
            "$ref" => {
                let (target, location) = self.resolve(at, value)?;
                self.edge(at, target, location, Part::Same)?;
            }
            "$dynamicRef" | "$recursiveRef" => {
                return Err(SchemaError::unsupported(at.location, at.keyword));
            }
            "dependentSchemas" | "dependencies" => {
                for (name, entry) in members(value) {
                    if entry.is_array() {
                        self.nodes[node].steps += literal_steps(entry);
                    } else {
                        self.edge(at, entry, at.below(name), Part::Same)?;
                    }
                }
            }
            "properties" => {
                for (name, entry) in members(value) {
                    let next = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
                    let number = *self.names.entry(name).or_insert(next);
                    self.edge(at, entry, at.below(name), Part::Property(number))?;
                    self.nodes[node].steps += 1;
                }
            }
            "patternProperties" => {
                for (pattern, entry) in members(value) {
                    let cost = self.patterns.byte_cost(pattern, at.location)?;
                    self.nodes[node].property_steps += 1;
                    self.nodes[node].name_byte_cost += cost;
                    self.edge(at, entry, at.below(pattern), Part::AnyProperty)?;
                }
            }
            "propertyNames" => self.one(at, value, Part::AnyProperty)?,
            "additionalProperties" => self.one(at, value, Part::OtherProperties)?,
            "unevaluatedProperties" => {
                self.nodes[node].unevaluated = true;
                self.one(at, value, Part::OtherProperties)?;
            }
            "items" if value.is_array() => self.list(at, value, Part::Item)?,
            "prefixItems" => self.list(at, value, Part::Item)?,
            "items" if !keywords.contains_key("prefixItems") => {
                self.one(at, value, Part::AnyItem)?;
            }
            "items" | "additionalItems" => self.one(at, value, Part::OtherItems)?,
            "contains" => self.one(at, value, Part::AnyItem)?,
            "unevaluatedItems" => {
                self.nodes[node].unevaluated = true;
                self.one(at, value, Part::OtherItems)?;
            }
            // Definitions are applied only where referenced, but are checked like other subschemas.
            "$defs" | "definitions" => {
                for (name, entry) in members(value) {
                    self.node(entry, at.below(name))?;
                }
            }
            "uniqueItems" => self.nodes[node].reads_all |= *value != Value::Bool(false),
            "pattern" => {
                if let Value::String(pattern) = value {
                    let cost = self.patterns.byte_cost(pattern, at.location)?;
                    self.nodes[node].byte_cost += cost;
                }
            }
            "minLength" | "maxLength" => self.nodes[node].byte_cost += 1,
            "contentEncoding" | "contentMediaType" => {
                self.nodes[node].byte_cost += CONTENT_BYTE_COST;
            }
            "enum" | "const" | "required" | "dependentRequired" => {
                self.nodes[node].steps += literal_steps(value);
            }
            _ => {}
        }
        Ok(())
    }

    fn one(
        &mut self,
        at: &KeywordLocation<'_>,
        value: &'a Value,
        part: Part,
    ) -> Result<(), SchemaError> {
        self.edge(at, value, format!("{}/{}", at.location, at.keyword), part)
    }

    fn list(
        &mut self,
        at: &KeywordLocation<'_>,
        value: &'a Value,
        part: impl Fn(u32) -> Part,
    ) -> Result<(), SchemaError> {
        for (position, entry) in value.as_array().into_iter().flatten().enumerate() {
            let number = u32::try_from(position).unwrap_or(u32::MAX);
            self.edge(at, entry, at.below(&position.to_string()), part(number))?;
        }
        Ok(())
    }

    fn edge(
        &mut self,
        at: &KeywordLocation<'_>,
        value: &'a Value,
        location: String,
        part: Part,
    ) -> Result<(), SchemaError> {
        let to = self.node(value, location)?;
        let marks = matches!(at.keyword, "contains" | "unevaluatedItems" | "unevaluatedProperties");
        self.nodes[at.index].edges.push(Edge { to, part, marks });
        Ok(())
    }

    /// Returns the subschema that a reference points to, and its location. Only the schema itself is searched.
    fn resolve(
        &self,
        at: &KeywordLocation<'_>,
        reference: &Value,
    ) -> Result<(&'a Value, String), SchemaError> {
        let invalid = || SchemaError::Reference {
            location: at.location.to_owned(),
            reference: reference.to_string(),
        };
        let fragment = reference.as_str().and_then(|text| text.strip_prefix('#'));
        let fragment = fragment.ok_or_else(invalid)?;
        let pointer = percent_encoding::percent_decode_str(fragment).decode_utf8();
        let pointer = pointer.map_err(|_| invalid())?;
        // An embedded document would change the meaning of references below it.
        for (end, _) in pointer.match_indices('/').skip(1) {
            let ancestor = self.root.pointer(&pointer[..end]).ok_or_else(invalid)?;
            if ["$id", "id"].iter().any(|id| ancestor.get(id).is_some_and(Value::is_string)) {
                return Err(SchemaError::unsupported(&pointer[..end], "$id"));
            }
        }
        let target = self.root.pointer(&pointer).ok_or_else(invalid)?;
        Ok((target, pointer.into_owned()))
    }
}

/// Location of a keyword.
struct KeywordLocation<'a> {
    index: usize,
    location: &'a str,
    keyword: &'a str,
}

impl KeywordLocation<'_> {
    /// Returns the pointer to an entry of the keyword's value.
    fn below(&self, entry: &str) -> String {
        let entry = entry.replace('~', "~0").replace('/', "~1");
        format!("{}/{}/{entry}", self.location, self.keyword)
    }
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

/// Returns the number of steps to compare a value with a literal, or to look up the names in the literal: one
/// for each value in the literal, and one for each 16 bytes of text.
fn literal_steps(value: &Value) -> u64 {
    match value {
        Value::Array(items) => 1 + items.iter().map(literal_steps).sum::<u64>(),
        Value::Object(members) => {
            1 + members
                .iter()
                .map(|(name, value)| text_steps(name) + literal_steps(value))
                .sum::<u64>()
        }
        Value::String(text) => 1 + text_steps(text),
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
    }
}

fn text_steps(text: &str) -> u64 {
    text.len() as u64 / 16
}

impl Graph {
    /// Returns the nodes in an order in which every node precedes those that it applies to the same
    /// value.
    pub(crate) fn topological_order(&self) -> Result<Vec<usize>, SchemaError> {
        #[derive(Clone, Copy, PartialEq)]
        enum Visit {
            New,
            Open,
            Done,
        }
        let mut visits = vec![Visit::New; self.nodes.len()];
        let mut order = Vec::with_capacity(self.nodes.len());
        for start in 0..self.nodes.len() {
            // Each entry is a node and the number of its edges that were followed.
            let mut path = vec![(start, 0)];
            while let Some((node, followed)) = path.pop() {
                if followed == 0 {
                    if visits[node] == Visit::Done {
                        continue;
                    }
                    visits[node] = Visit::Open;
                }
                let Some(edge) = self.nodes[node].edges.get(followed) else {
                    visits[node] = Visit::Done;
                    order.push(node);
                    continue;
                };
                path.push((node, followed + 1));
                if edge.is_in_place() && visits[edge.to] != Visit::Done {
                    if visits[edge.to] == Visit::Open {
                        let location = self.nodes[edge.to].location.clone();
                        return Err(SchemaError::EndlessReference { location });
                    }
                    path.push((edge.to, 0));
                }
            }
        }
        order.reverse();
        Ok(order)
    }
}

impl Part {
    /// Returns whether the part is the item at one index, or the property with one name.
    pub(crate) fn is_named(self, is_item: bool) -> bool {
        matches!((self, is_item), (Self::Item(_), true) | (Self::Property(_), false))
    }
}

impl Edge {
    /// Returns whether the edge leads to the same value.
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self.part, Part::Same | Part::Condition)
    }
}
