//! How many steps a validation takes at most, for a value at each depth of a payload.
//!
//! A step is one keyword applied to one value, or one comparison with a literal: some tens of
//! nanoseconds. Which subschemas are applied to a value is known only when it is validated. How
//! many applications there can be is known from the schema: a subschema that is applied n times to
//! an object applies each of its own subschemas n times to each property. This is counted here,
//! depth by depth, taking at each depth the most that any property or item can get.
//!
//! The validator visits a value in three ways, and each is counted for itself: to find out whether
//! it is valid, to collect violations (which first finds out whether the value is valid, again at
//! every depth), and to mark what `unevaluatedProperties` and `unevaluatedItems` leave out.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::{
    SchemaError,
    graph::{Edge, Graph, Part},
};

/// Deepest payload that is parsed; `serde_json` refuses deeper ones.
pub(crate) const MAX_DEPTH: usize = 128;
/// Steps that `uniqueItems` takes for each value below an array, and in sixteenths for each byte.
const UNIQUE_STEPS: u64 = 4;
/// Applications of a subschema are not counted beyond this.
const MANY: i64 = 1 << 40;
/// Subschemas that are applied to one value, one by the other, at most.
const MAX_CHAIN: usize = 64;
/// Subschemas that are applied on the way to the deepest value at most: what the stack holds.
const MAX_PATH: usize = 2048;
/// Subschemas that one applies to the same value, counted along every way, at most.
const MAX_EXPANSION: u64 = 5_000;
/// The same over all subschemas of a schema, which bounds the work to compile it.
const MAX_EXPANSION_IN_ALL: u64 = 200_000;
/// Names and keywords of those subschemas, counted along every way, over all subschemas of a schema: the
/// validator may copy them for each.
const MAX_NAMES_IN_ALL: u64 = 1_000_000;
/// The same over those with `unevaluatedProperties` or `unevaluatedItems`, for which it always does.
const MAX_UNEVALUATED_NAMES: u64 = 200_000;
/// Conditions whose outcomes the validator may need several times: it makes at most this many groups
/// of what they decide, and asks for each group anew.
const MAX_GROUPS: u64 = 64;
/// A value down to this depth ...
const COMMON_DEPTH: usize = 8;
/// ... must not take more steps than this, or the schema is refused when it is declared.
const MAX_STEPS_AT_COMMON_DEPTH: u64 = 100_000;

/// Ways to visit a value.
const VALID: usize = 0;
const VIOLATIONS: usize = 1;
const MARK: usize = 2;
const WAYS: usize = 3;

/// What a value at some depth costs.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Rate {
    /// Steps for the value.
    pub(crate) value: u64,
    /// Sixteenths of a step for each byte of it when it is a string, and of its name.
    pub(crate) byte: u64,
}

/// Upper bounds of what validations with one schema cost.
#[derive(Debug)]
pub(crate) struct Bound {
    /// To find out whether a payload is valid, by depth.
    valid: Vec<Rate>,
    /// To collect its violations, by depth.
    violations: Vec<Rate>,
}

impl Bound {
    /// Counts, and refuses a schema that no useful payload could be validated with.
    pub(crate) fn of(graph: &Graph) -> Result<Self, SchemaError> {
        let order = graph.in_order()?;
        let expansions = expansions(graph, &order)?;
        check_paths(graph, &order)?;
        let counter = Counter::new(graph, order, expansions);
        let valid = counter.rates(VALID);
        for depth in 0..=COMMON_DEPTH {
            let steps = rate_at(&valid, depth).value;
            if steps > MAX_STEPS_AT_COMMON_DEPTH {
                let max = MAX_STEPS_AT_COMMON_DEPTH;
                return Err(SchemaError::TooExpensive { steps, depth, max });
            }
        }
        Ok(Self { valid, violations: counter.rates(VIOLATIONS) })
    }

    /// Steps to find out whether a payload of this shape is valid.
    pub(crate) fn steps_to_decide(&self, shape: &Shape) -> u64 {
        shape.steps(&self.valid)
    }

    /// Steps to collect the violations of a payload of this shape.
    pub(crate) fn steps_to_explain(&self, shape: &Shape) -> u64 {
        shape.steps(&self.violations)
    }
}

/// Rates do not change beyond the last depth that was counted.
fn rate_at(rates: &[Rate], depth: usize) -> Rate {
    rates.get(depth).or(rates.last()).copied().unwrap_or_default()
}

/// How many values a payload has at each depth, and how many bytes of strings and names.
#[derive(Debug)]
pub(crate) struct Shape {
    depths: Vec<(u64, u64)>,
}

impl Shape {
    pub(crate) fn of(payload: &Value) -> Self {
        let mut shape = Self { depths: Vec::new() };
        shape.count(payload, 0, 0);
        shape
    }

    fn count(&mut self, value: &Value, name_bytes: usize, depth: usize) {
        if self.depths.len() <= depth {
            self.depths.push((0, 0));
        }
        let text_bytes = value.as_str().map_or(0, str::len);
        let (values, bytes) = &mut self.depths[depth];
        *values += 1;
        *bytes += (name_bytes + text_bytes) as u64;
        match value {
            Value::Array(items) => {
                for item in items {
                    self.count(item, 0, depth + 1);
                }
            }
            Value::Object(members) => {
                for (name, member) in members {
                    self.count(member, name.len(), depth + 1);
                }
            }
            _ => {}
        }
    }

    /// Depth of the deepest value; the payload itself has depth 0.
    pub(crate) fn depth(&self) -> usize {
        self.depths.len().saturating_sub(1)
    }

    fn steps(&self, rates: &[Rate]) -> u64 {
        let steps = self.depths.iter().enumerate().map(|(depth, (values, bytes))| {
            let rate = rate_at(rates, depth);
            values.saturating_mul(rate.value).saturating_add(bytes.saturating_mul(rate.byte) / 16)
        });
        steps.fold(0, u64::saturating_add)
    }
}

/// How many subschemas each node applies to the same value, counted along every way.
fn expansions(graph: &Graph, order: &[usize]) -> Result<Vec<u64>, SchemaError> {
    let mut expansions = vec![1_u64; graph.nodes.len()];
    let mut names: Vec<u64> = graph.nodes.iter().map(|node| node.steps).collect();
    let mut chains = vec![1_usize; graph.nodes.len()];
    let (mut all, mut all_names, mut unevaluated_names) = (0_u64, 0_u64, 0_u64);
    for node in order.iter().rev().copied() {
        let edges = graph.nodes[node].edges.iter().filter(|edge| edge.is_in_place());
        for edge in edges {
            expansions[node] = expansions[node].saturating_add(expansions[edge.to]);
            names[node] = names[node].saturating_add(names[edge.to]);
            chains[node] = chains[node].max(chains[edge.to] + 1);
        }
        all = all.saturating_add(expansions[node]);
        all_names = all_names.saturating_add(names[node]);
        if graph.nodes[node].unevaluated {
            unevaluated_names = unevaluated_names.saturating_add(names[node]);
        }
        let location = || graph.nodes[node].location.clone();
        if chains[node] > MAX_CHAIN {
            return Err(SchemaError::TooLongChain { location: location(), max: MAX_CHAIN });
        }
        if expansions[node] > MAX_EXPANSION
            || all > MAX_EXPANSION_IN_ALL
            || all_names > MAX_NAMES_IN_ALL
            || unevaluated_names > MAX_UNEVALUATED_NAMES
        {
            return Err(SchemaError::TooManyAlternatives { location: location() });
        }
    }
    Ok(expansions)
}

/// Refuses a schema whose recursion takes too much stack for the deepest payload.
fn check_paths(graph: &Graph, order: &[usize]) -> Result<(), SchemaError> {
    // Longest way to an application of each node at the present depth; 0 means none.
    let mut lengths = vec![0_usize; graph.nodes.len()];
    lengths[0] = 1;
    for _ in 0..MAX_DEPTH {
        let mut next = vec![0_usize; graph.nodes.len()];
        for node in order.iter().copied() {
            let length = lengths[node];
            if length == 0 {
                continue;
            }
            if length > MAX_PATH {
                let location = graph.nodes[node].location.clone();
                return Err(SchemaError::TooDeepRecursion { location, max: MAX_PATH });
            }
            for edge in &graph.nodes[node].edges {
                let reached = if edge.is_in_place() { &mut lengths } else { &mut next };
                reached[edge.to] = reached[edge.to].max(length + 1);
            }
        }
        lengths = next;
    }
    Ok(())
}

/// One way in which a node passes on its applications to a property or an item.
#[derive(Clone, Copy)]
struct Flow {
    from: usize,
    to: usize,
    count: i64,
    marks: bool,
}

/// What distinguishes the property of one name, or the item at one index, from others.
#[derive(Default)]
struct Named {
    is_item: bool,
    /// In addition to what flows to any property or item; counts may be negative.
    flows: Vec<Flow>,
    /// The nodes that these reach, in order.
    reached: Vec<usize>,
}

/// How often each node is applied to a value, by way.
type Counts = Vec<[i64; WAYS]>;

/// Counts applications of nodes, depth by depth.
struct Counter<'a> {
    graph: &'a Graph,
    order: Vec<usize>,
    expansions: Vec<u64>,
    /// What flows to any property, whatever its name.
    properties: Vec<Flow>,
    /// What flows to any item.
    items: Vec<Flow>,
    named: Vec<Named>,
}

impl<'a> Counter<'a> {
    fn new(graph: &'a Graph, order: Vec<usize>, expansions: Vec<u64>) -> Self {
        let (mut properties, mut items) = (Vec::new(), Vec::new());
        let mut by_part: HashMap<Part, Named> = HashMap::new();
        for (from, node) in graph.nodes.iter().enumerate() {
            let parts: HashSet<Part> = node.edges.iter().map(|edge| edge.part).collect();
            for &Edge { to, part, marks } in &node.edges {
                let flow = |count| Flow { from, to, count, marks };
                let mut take_from = |is_item: bool| {
                    for part in parts.iter().filter(|part| part.is_named(is_item)) {
                        by_part.entry(*part).or_default().flows.push(flow(-1));
                    }
                };
                match part {
                    Part::Same | Part::Condition => {}
                    Part::AnyProperty => properties.push(flow(1)),
                    Part::AnyItem => items.push(flow(1)),
                    Part::OtherProperties => {
                        properties.push(flow(1));
                        take_from(false);
                    }
                    Part::OtherItems => {
                        items.push(flow(1));
                        take_from(true);
                    }
                    Part::Property(_) | Part::Item(_) => {
                        by_part.entry(part).or_default().flows.push(flow(1));
                    }
                }
            }
        }
        let mut positions = vec![0; order.len()];
        for (position, node) in order.iter().enumerate() {
            positions[*node] = position;
        }
        let named = by_part.into_iter().map(|(part, named)| {
            let mut reached: HashSet<usize> = HashSet::new();
            let mut next: Vec<usize> = named.flows.iter().map(|flow| flow.to).collect();
            while let Some(node) = next.pop() {
                if reached.insert(node) {
                    let edges = graph.nodes[node].edges.iter().filter(|edge| edge.is_in_place());
                    next.extend(edges.map(|edge| edge.to));
                }
            }
            let mut reached: Vec<usize> = reached.into_iter().collect();
            reached.sort_unstable_by_key(|node| positions[*node]);
            Named { is_item: part.is_named(true), reached, ..named }
        });
        let named = named.collect();
        Self { graph, order, expansions, properties, items, named }
    }

    /// The rates of validations that begin in this way.
    fn rates(&self, way: usize) -> Vec<Rate> {
        let mut counts: Counts = vec![[0; WAYS]; self.graph.nodes.len()];
        counts[0][way] = 1;
        self.apply_in_place(&mut counts, &self.order);
        let mut own = self.charge(&counts, &self.order);
        // What the values above bring along: they read everything below them.
        let mut read = 0_u64;
        let mut from_parent = Rate::default();
        let mut rates = Vec::new();
        for _ in 0..=MAX_DEPTH {
            rates.push(Rate {
                value: own.value.saturating_add(from_parent.value).saturating_add(read),
                byte: own.byte.saturating_add(from_parent.byte).saturating_add(read),
            });
            let (next, next_own) = self.descend(&counts);
            let (for_children, reading) = self.charge_children(&counts);
            if reading == 0 && for_children == from_parent && next == counts {
                break;
            }
            read = read.saturating_add(reading);
            from_parent = for_children;
            (counts, own) = (next, next_own);
        }
        rates
    }

    /// Passes on applications to subschemas of the same value.
    fn apply_in_place(&self, counts: &mut Counts, order: &[usize]) {
        for from in order.iter().copied() {
            let node = &self.graph.nodes[from];
            if node.unevaluated {
                let visits = add(counts[from][VALID], counts[from][VIOLATIONS]);
                counts[from][MARK] = add(counts[from][MARK], visits);
            }
            let [valid, violations, mark] = counts[from];
            for edge in node.edges.iter().filter(|edge| edge.is_in_place()) {
                let times = match edge.part {
                    Part::Condition => self.expansions[from].min(MAX_GROUPS),
                    _ => 1,
                };
                let marking = mark.saturating_mul(i64::try_from(times).unwrap_or(MANY));
                let reached = &mut counts[edge.to];
                let decided = add(valid, add(add(violations, violations), marking));
                reached[VALID] = add(reached[VALID], decided);
                reached[VIOLATIONS] = add(reached[VIOLATIONS], violations);
                reached[MARK] = add(reached[MARK], mark);
            }
        }
    }

    /// Cost of a value to which these nodes are applied this many times.
    fn charge(&self, counts: &Counts, nodes: &[usize]) -> Rate {
        let mut rate = Rate::default();
        for (node, times) in
            nodes.iter().map(|node| (&self.graph.nodes[*node], total(&counts[*node])))
        {
            rate.value = rate.value.saturating_add(times.saturating_mul(node.steps));
            rate.byte = rate.byte.saturating_add(times.saturating_mul(node.byte_cost));
        }
        rate
    }

    /// What each member of a value costs in addition; and the number of times that everything below it is read.
    fn charge_children(&self, counts: &Counts) -> (Rate, u64) {
        let (mut rate, mut reading) = (Rate::default(), 0_u64);
        for (node, times) in self.graph.nodes.iter().zip(counts.iter().map(total)) {
            let steps = node.property_steps + u64::from(node.unevaluated);
            rate.value = rate.value.saturating_add(times.saturating_mul(steps));
            rate.byte = rate.byte.saturating_add(times.saturating_mul(node.name_byte_cost));
            let steps = if node.reads_all { UNIQUE_STEPS } else { 0 };
            reading = reading.saturating_add(times.saturating_mul(steps));
        }
        (rate, reading)
    }

    /// The most applications of each node to any property or item, and the most that one costs.
    fn descend(&self, counts: &Counts) -> (Counts, Rate) {
        let none = || vec![[0; WAYS]; counts.len()];
        let flow = |flows: &[Flow], into: &mut Counts| {
            for flow in flows {
                let [valid, violations, mark] = counts[flow.from];
                let marking = if flow.marks { mark } else { 0 };
                let decided = add(valid, add(add(violations, violations), marking));
                let reached = &mut into[flow.to];
                reached[VALID] = add(reached[VALID], decided.saturating_mul(flow.count));
                reached[VIOLATIONS] =
                    add(reached[VIOLATIONS], violations.saturating_mul(flow.count));
            }
        };
        let [of_properties, of_items] = [&self.properties, &self.items].map(|flows| {
            let mut any = none();
            flow(flows, &mut any);
            self.apply_in_place(&mut any, &self.order);
            any
        });
        let rates = [&of_properties, &of_items].map(|any| self.charge(any, &self.order));
        let mut rate = rates[0].or(rates[1]);
        let mut most: Counts = of_properties.iter().zip(&of_items).map(larger).collect();
        let mut more = none();
        for named in &self.named {
            let any = if named.is_item { &of_items } else { &of_properties };
            flow(&named.flows, &mut more);
            self.apply_in_place(&mut more, &named.reached);
            let without = self.charge(any, &named.reached);
            for node in named.reached.iter().copied() {
                more[node] = std::array::from_fn(|way| add(any[node][way], more[node][way]));
                most[node] = larger((&most[node], &more[node]));
            }
            let with = self.charge(&more, &named.reached);
            rate = rate.or(rates[usize::from(named.is_item)].replacing(without, with));
            for node in &named.reached {
                more[*node] = [0; WAYS];
            }
        }
        (most, rate)
    }
}

impl Rate {
    /// The larger one of each.
    fn or(self, other: Self) -> Self {
        Self { value: self.value.max(other.value), byte: self.byte.max(other.byte) }
    }

    fn replacing(self, part: Self, by: Self) -> Self {
        Self {
            value: self.value.saturating_sub(part.value).saturating_add(by.value),
            byte: self.byte.saturating_sub(part.byte).saturating_add(by.byte),
        }
    }
}

/// Applications in all ways.
fn total(ways: &[i64; WAYS]) -> u64 {
    u64::try_from(ways.iter().copied().fold(0, add)).unwrap_or(0)
}

fn larger((one, other): (&[i64; WAYS], &[i64; WAYS])) -> [i64; WAYS] {
    std::array::from_fn(|way| one[way].max(other[way]))
}

/// The sum, up to [`MANY`] either way.
fn add(one: i64, other: i64) -> i64 {
    one.saturating_add(other).clamp(-MANY, MANY)
}
