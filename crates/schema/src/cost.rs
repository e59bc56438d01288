//! Upper bound on the number of steps of a validation, for a value at each depth of a payload.
//!
//! A step is the application of one keyword to one value, or one comparison with a literal, and takes some
//! tens of nanoseconds. The subschemas that are applied to a value are known only at validation. The maximum
//! number of applications follows from the schema: a subschema that is applied n times to an object
//! applies each of its subschemas n times to each property. This module counts applications at each
//! depth, and uses the maximum over all properties and items at that depth.
//!
//! The validator visits a value in three modes, which are counted separately: to decide whether it is
//! valid, to collect violations (which first decides whether the value is valid, again at every
//! depth), and to mark the evaluated parts for `unevaluatedProperties` and `unevaluatedItems`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::{
    SchemaError,
    graph::{Edge, Graph, Part},
};

/// Maximum depth of a payload; `serde_json` rejects deeper payloads.
pub(crate) const MAX_DEPTH: usize = 128;
/// Number of steps of `uniqueItems` for each value below an array, and of sixteenths of a step for each byte.
const UNIQUE_STEPS: u64 = 4;
/// Limit at which counts of applications saturate.
const MAX_COUNT: i64 = 1 << 40;
/// Maximum length of a chain of subschemas that are applied to one value.
const MAX_CHAIN: usize = 64;
/// Maximum number of subschemas on the path to the deepest value, which bounds the stack.
const MAX_PATH: usize = 2048;
/// Maximum number of subschemas that a subschema applies to the same value, counted along every path.
const MAX_EXPANSION: u64 = 5_000;
/// Maximum sum of these numbers over all subschemas, which bounds the work to compile a schema.
const MAX_TOTAL_EXPANSION: u64 = 200_000;
/// Maximum number of names and keywords of the applied subschemas, counted along every path and summed over all
/// subschemas: the validator may copy them for each subschema.
const MAX_TOTAL_NAMES: u64 = 1_000_000;
/// Maximum number of names and keywords that subschemas with `unevaluatedProperties` or `unevaluatedItems` apply,
/// counted in the same way: for these subschemas, the validator always copies them.
const MAX_UNEVALUATED_NAMES: u64 = 200_000;
/// Maximum number of groups into which the validator divides the subschemas that conditions select; it evaluates
/// the conditions again for each group.
const MAX_GROUPS: u64 = 64;
/// Maximum depth of the values to which [`MAX_STEPS_AT_COMMON_DEPTH`] applies.
const COMMON_DEPTH: usize = 8;
/// Maximum number of steps for a value down to [`COMMON_DEPTH`]; a schema above it is rejected at declaration.
const MAX_STEPS_AT_COMMON_DEPTH: u64 = 100_000;

/// Mode that decides whether a value is valid.
const DECIDE: usize = 0;
/// Mode that collects the violations of a value.
const EXPLAIN: usize = 1;
/// Mode that marks the evaluated parts of a value.
const MARK: usize = 2;
/// Number of modes in which the validator visits a value.
const MODES: usize = 3;

/// Cost of a value at one depth.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Rate {
    /// Number of steps for the value.
    pub(crate) value: u64,
    /// Number of sixteenths of a step for each byte of a string value, and of the name of the value.
    pub(crate) byte: u64,
}

/// Upper bounds of the cost of validations with one schema.
#[derive(Debug)]
pub(crate) struct Bound {
    /// Rates to decide whether a payload is valid, by depth.
    decide: Vec<Rate>,
    /// Rates to collect the violations of a payload, by depth.
    explain: Vec<Rate>,
}

impl Bound {
    /// Computes the bounds of a schema; rejects a schema that could not validate any useful payload.
    pub(crate) fn of(graph: &Graph) -> Result<Self, SchemaError> {
        let order = graph.topological_order()?;
        let expansions = expansions(graph, &order)?;
        check_paths(graph, &order)?;
        let counter = Counter::new(graph, order, expansions);
        let decide = counter.rates(DECIDE);
        for depth in 0..=COMMON_DEPTH {
            let steps = rate_at(&decide, depth).value;
            if steps > MAX_STEPS_AT_COMMON_DEPTH {
                let max = MAX_STEPS_AT_COMMON_DEPTH;
                return Err(SchemaError::TooExpensive { steps, depth, max });
            }
        }
        Ok(Self { decide, explain: counter.rates(EXPLAIN) })
    }

    /// Returns the maximum number of steps to decide whether a payload of the given shape is valid.
    pub(crate) fn steps_to_decide(&self, shape: &Shape) -> u64 {
        shape.steps(&self.decide)
    }

    /// Returns the maximum number of steps to collect the violations of a payload of the given shape.
    pub(crate) fn steps_to_explain(&self, shape: &Shape) -> u64 {
        shape.steps(&self.explain)
    }
}

/// Returns the rate at a depth. Rates do not change beyond the last counted depth.
fn rate_at(rates: &[Rate], depth: usize) -> Rate {
    rates.get(depth).or(rates.last()).copied().unwrap_or_default()
}

/// Number of values, and number of bytes of strings and names, at each depth of a payload.
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

    /// Returns the depth of the deepest value; the payload itself has depth 0.
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

/// Returns the number of subschemas that each node applies to the same value, counted along every path.
fn expansions(graph: &Graph, order: &[usize]) -> Result<Vec<u64>, SchemaError> {
    let mut expansions = vec![1_u64; graph.nodes.len()];
    let mut names: Vec<u64> = graph.nodes.iter().map(|node| node.steps).collect();
    let mut chains = vec![1_usize; graph.nodes.len()];
    let (mut total, mut total_names, mut unevaluated_names) = (0_u64, 0_u64, 0_u64);
    for node in order.iter().rev().copied() {
        let edges = graph.nodes[node].edges.iter().filter(|edge| edge.is_in_place());
        for edge in edges {
            expansions[node] = expansions[node].saturating_add(expansions[edge.to]);
            names[node] = names[node].saturating_add(names[edge.to]);
            chains[node] = chains[node].max(chains[edge.to] + 1);
        }
        total = total.saturating_add(expansions[node]);
        total_names = total_names.saturating_add(names[node]);
        if graph.nodes[node].unevaluated {
            unevaluated_names = unevaluated_names.saturating_add(names[node]);
        }
        let location = || graph.nodes[node].location.clone();
        if chains[node] > MAX_CHAIN {
            return Err(SchemaError::TooLongChain { location: location(), max: MAX_CHAIN });
        }
        if expansions[node] > MAX_EXPANSION
            || total > MAX_TOTAL_EXPANSION
            || total_names > MAX_TOTAL_NAMES
            || unevaluated_names > MAX_UNEVALUATED_NAMES
        {
            return Err(SchemaError::TooManyAlternatives { location: location() });
        }
    }
    Ok(expansions)
}

/// Rejects a schema whose recursion uses too much stack for the deepest payload.
fn check_paths(graph: &Graph, order: &[usize]) -> Result<(), SchemaError> {
    // Longest path to an application of each node at the current depth; 0 means none.
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

/// Edge along which a node applies another node to a property or an item.
#[derive(Clone, Copy)]
struct Flow {
    from: usize,
    to: usize,
    count: i64,
    marks: bool,
}

/// Difference between the flows to the property with one name, or to the item at one index, and the flows to
/// any property or item.
#[derive(Default)]
struct NamedPart {
    is_item: bool,
    /// Flows to add to the flows to any property or item; counts may be negative.
    flows: Vec<Flow>,
    /// Nodes that `flows` reach, in order.
    reached: Vec<usize>,
}

/// Number of applications of each node to a value, by mode.
type Counts = Vec<[i64; MODES]>;

/// Counts applications of nodes at each depth.
struct Counter<'a> {
    graph: &'a Graph,
    order: Vec<usize>,
    expansions: Vec<u64>,
    /// Flows to any property.
    properties: Vec<Flow>,
    /// Flows to any item.
    items: Vec<Flow>,
    named: Vec<NamedPart>,
}

impl<'a> Counter<'a> {
    fn new(graph: &'a Graph, order: Vec<usize>, expansions: Vec<u64>) -> Self {
        let (mut properties, mut items) = (Vec::new(), Vec::new());
        let mut by_part: HashMap<Part, NamedPart> = HashMap::new();
        for (from, node) in graph.nodes.iter().enumerate() {
            let parts: HashSet<Part> = node.edges.iter().map(|edge| edge.part).collect();
            for &Edge { to, part, marks } in &node.edges {
                let flow = |count| Flow { from, to, count, marks };
                let mut subtract_named = |is_item: bool| {
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
                        subtract_named(false);
                    }
                    Part::OtherItems => {
                        items.push(flow(1));
                        subtract_named(true);
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
            NamedPart { is_item: part.is_named(true), reached, ..named }
        });
        let named = named.collect();
        Self { graph, order, expansions, properties, items, named }
    }

    /// Returns the rates of validations in the given mode.
    fn rates(&self, mode: usize) -> Vec<Rate> {
        let mut counts: Counts = vec![[0; MODES]; self.graph.nodes.len()];
        counts[0][mode] = 1;
        self.apply_in_place(&mut counts, &self.order);
        let mut own = self.charge(&counts, &self.order);
        // Steps that the `uniqueItems` of values above adds, which reads everything below them.
        let mut from_unique = 0_u64;
        let mut from_parent = Rate::default();
        let mut rates = Vec::new();
        for _ in 0..=MAX_DEPTH {
            rates.push(Rate {
                value: own.value.saturating_add(from_parent.value).saturating_add(from_unique),
                byte: own.byte.saturating_add(from_parent.byte).saturating_add(from_unique),
            });
            let (next, next_own) = self.descend(&counts);
            let (for_children, unique_steps) = self.charge_children(&counts);
            if unique_steps == 0 && for_children == from_parent && next == counts {
                break;
            }
            from_unique = from_unique.saturating_add(unique_steps);
            from_parent = for_children;
            (counts, own) = (next, next_own);
        }
        rates
    }

    /// Propagates applications to subschemas of the same value.
    fn apply_in_place(&self, counts: &mut Counts, order: &[usize]) {
        for from in order.iter().copied() {
            let node = &self.graph.nodes[from];
            if node.unevaluated {
                let visits = add(counts[from][DECIDE], counts[from][EXPLAIN]);
                counts[from][MARK] = add(counts[from][MARK], visits);
            }
            let [decide, explain, mark] = counts[from];
            for edge in node.edges.iter().filter(|edge| edge.is_in_place()) {
                let times = match edge.part {
                    Part::Condition => self.expansions[from].min(MAX_GROUPS),
                    _ => 1,
                };
                let marking = mark.saturating_mul(i64::try_from(times).unwrap_or(MAX_COUNT));
                let reached = &mut counts[edge.to];
                let decisions = add(decide, add(add(explain, explain), marking));
                reached[DECIDE] = add(reached[DECIDE], decisions);
                reached[EXPLAIN] = add(reached[EXPLAIN], explain);
                reached[MARK] = add(reached[MARK], mark);
            }
        }
    }

    /// Returns the cost of a value to which `nodes` are applied as often as `counts` specifies.
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

    /// Returns the additional cost of each member of a value, and the steps that `uniqueItems` adds to each value
    /// below it.
    fn charge_children(&self, counts: &Counts) -> (Rate, u64) {
        let (mut rate, mut unique_steps) = (Rate::default(), 0_u64);
        for (node, times) in self.graph.nodes.iter().zip(counts.iter().map(total)) {
            let steps = node.property_steps + u64::from(node.unevaluated);
            rate.value = rate.value.saturating_add(times.saturating_mul(steps));
            rate.byte = rate.byte.saturating_add(times.saturating_mul(node.name_byte_cost));
            let steps = if node.reads_all { UNIQUE_STEPS } else { 0 };
            unique_steps = unique_steps.saturating_add(times.saturating_mul(steps));
        }
        (rate, unique_steps)
    }

    /// Returns the maximum number of applications of each node to any property or item, and the maximum cost of a
    /// property or item.
    fn descend(&self, counts: &Counts) -> (Counts, Rate) {
        let zero = || vec![[0; MODES]; counts.len()];
        let flow = |flows: &[Flow], into: &mut Counts| {
            for flow in flows {
                let [decide, explain, mark] = counts[flow.from];
                let marking = if flow.marks { mark } else { 0 };
                let decisions = add(decide, add(add(explain, explain), marking));
                let reached = &mut into[flow.to];
                reached[DECIDE] = add(reached[DECIDE], decisions.saturating_mul(flow.count));
                reached[EXPLAIN] = add(reached[EXPLAIN], explain.saturating_mul(flow.count));
            }
        };
        let [of_properties, of_items] = [&self.properties, &self.items].map(|flows| {
            let mut any = zero();
            flow(flows, &mut any);
            self.apply_in_place(&mut any, &self.order);
            any
        });
        let rates = [&of_properties, &of_items].map(|any| self.charge(any, &self.order));
        let mut rate = rates[0].max(rates[1]);
        let mut max_counts: Counts = of_properties.iter().zip(&of_items).map(larger).collect();
        let mut named_counts = zero();
        for named in &self.named {
            let any = if named.is_item { &of_items } else { &of_properties };
            flow(&named.flows, &mut named_counts);
            self.apply_in_place(&mut named_counts, &named.reached);
            let without = self.charge(any, &named.reached);
            for node in named.reached.iter().copied() {
                named_counts[node] =
                    std::array::from_fn(|mode| add(any[node][mode], named_counts[node][mode]));
                max_counts[node] = larger((&max_counts[node], &named_counts[node]));
            }
            let with = self.charge(&named_counts, &named.reached);
            rate = rate.max(rates[usize::from(named.is_item)].replacing(without, with));
            for node in &named.reached {
                named_counts[*node] = [0; MODES];
            }
        }
        (max_counts, rate)
    }
}

impl Rate {
    /// Returns the maximum of each field.
    fn max(self, other: Self) -> Self {
        Self { value: self.value.max(other.value), byte: self.byte.max(other.byte) }
    }

    fn replacing(self, part: Self, by: Self) -> Self {
        Self {
            value: self.value.saturating_sub(part.value).saturating_add(by.value),
            byte: self.byte.saturating_sub(part.byte).saturating_add(by.byte),
        }
    }
}

/// Returns the number of applications in all modes.
fn total(modes: &[i64; MODES]) -> u64 {
    u64::try_from(modes.iter().copied().fold(0, add)).unwrap_or(0)
}

fn larger((one, other): (&[i64; MODES], &[i64; MODES])) -> [i64; MODES] {
    std::array::from_fn(|mode| one[mode].max(other[mode]))
}

/// Returns the sum, clamped to the range from -[`MAX_COUNT`] to [`MAX_COUNT`].
fn add(one: i64, other: i64) -> i64 {
    one.saturating_add(other).clamp(-MAX_COUNT, MAX_COUNT)
}
