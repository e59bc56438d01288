/**
 * Finds the source text of the members of a JSON object. The digest of the output is computed over
 * the bytes of the chunks, and numbers may lose precision in JavaScript, so encoding parsed values
 * again is not sufficient. No dependencies; runs in browsers.
 */

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COMMA = 0x2c;
const COLON = 0x3a;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;

/**
 * Returns the members of an object, each with everything between its colon and the comma or brace
 * that follows, including white space. If several members have the same name, the last one is
 * returned.
 * @param {string} text Well-formed JSON.
 * @returns {Map<string, string>} Empty if the text is not an object.
 */
export function rawMembers(text) {
  const members = new Map();
  let at = text.search(/\S/);
  if (text.charCodeAt(at) !== OPEN_BRACE) return members;
  at = text.indexOf('"', at + 1);
  while (at >= 0) {
    const nameEnd = stringEnd(text, at);
    const name = JSON.parse(text.slice(at, nameEnd));
    at = nameEnd;
    while (text.charCodeAt(at) !== COLON) at += 1;
    const end = valueEnd(text, at + 1);
    members.set(name, text.slice(at + 1, end));
    at = text.charCodeAt(end) === COMMA ? text.indexOf('"', end) : -1;
  }
  return members;
}

/**
 * Returns the source text of the elements of an array.
 * @param {string} text Well-formed JSON.
 * @returns {string[]} Empty if the text is not an array.
 */
export function rawElements(text) {
  const elements = /** @type {string[]} */ ([]);
  let at = text.search(/\S/);
  if (text.charCodeAt(at) !== OPEN_BRACKET || /^\s*\[\s*\]\s*$/.test(text)) return elements;
  do {
    const end = valueEnd(text, at + 1);
    elements.push(text.slice(at + 1, end));
    at = end;
  } while (text.charCodeAt(at) === COMMA);
  return elements;
}

/**
 * @param {string} text
 * @param {number} at Position of the opening quote of a string.
 * @returns {number} Position after its closing quote.
 */
function stringEnd(text, at) {
  for (let end = at + 1; end < text.length; end += 1) {
    const code = text.charCodeAt(end);
    if (code === BACKSLASH) end += 1;
    else if (code === QUOTE) return end + 1;
  }
  return text.length;
}

/**
 * @param {string} text
 * @param {number} at Start of a value.
 * @returns {number} Position of the comma, brace or bracket after it.
 */
function valueEnd(text, at) {
  let depth = 0;
  for (let end = at; end < text.length; end += 1) {
    const code = text.charCodeAt(end);
    if (code === QUOTE) {
      end = stringEnd(text, end) - 1;
    } else if (code === OPEN_BRACE || code === OPEN_BRACKET) {
      depth += 1;
    } else if (code === CLOSE_BRACE || code === CLOSE_BRACKET) {
      if (depth === 0) return end;
      depth -= 1;
    } else if (code === COMMA && depth === 0) {
      return end;
    }
  }
  return text.length;
}
