/* unit-pem.h - keys and certificates for the unit tests, made once and used nowhere else:
 *
 *     openssl ecparam -name prime256v1 -genkey            the parameters and the SEC1 key
 *     openssl genrsa -traditional 2048 (or 4096)
 *     openssl pkcs8 -topk8 -nocrypt -in key.pem           the same as PKCS#8
 *     openssl req -x509 -new -key key.pem -subj /CN=name.example -days 36500 */

/* The curve P-256, as openssl ecparam -genkey puts it before the key */
#define PEM_EC_PARAMETERS \
	"-----BEGIN EC PARAMETERS-----\n" \
	"BggqhkjOPQMBBw==\n" \
	"-----END EC PARAMETERS-----\n"

/* P-256, SEC1 */
#define PEM_EC_KEY \
	"-----BEGIN EC PRIVATE KEY-----\n" \
	"MHcCAQEEIATRA5WQpnR3eJRcGWEyMhGUL9ESlyV8wRi3LQLkKxIxoAoGCCqGSM49\n" \
	"AwEHoUQDQgAENSCcluYzJdG+m/o8a55+Or7qIXMzaY76gW0O1u0PUeM4Mz2a2lod\n" \
	"itb/y5KzNBceVt9hyD9dRobXcDR2B5AKMg==\n" \
	"-----END EC PRIVATE KEY-----\n"

/* The same, PKCS#8 */
#define PEM_EC_KEY8 \
	"-----BEGIN PRIVATE KEY-----\n" \
	"MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgBNEDlZCmdHd4lFwZ\n" \
	"YTIyEZQv0RKXJXzBGLctAuQrEjGhRANCAAQ1IJyW5jMl0b6b+jxrnn46vuohczNp\n" \
	"jvqBbQ7W7Q9R4zgzPZraWh2K1v/LkrM0Fx5W32HIP11GhtdwNHYHkAoy\n" \
	"-----END PRIVATE KEY-----\n"

/* Its certificate */
#define PEM_EC_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIBgjCCASegAwIBAgIUHtmXN0ZIAzhNyitn7smMcdv7LdAwCgYIKoZIzj0EAwIw\n" \
	"FTETMBEGA1UEAwwKZWMuZXhhbXBsZTAgFw0yNjExMjIxMDAwMDdaGA8yMTI2MTAy\n" \
	"OTEwMDAwN1owFTETMBEGA1UEAwwKZWMuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqG\n" \
	"SM49AwEHA0IABDUgnJbmMyXRvpv6PGuefjq+6iFzM2mO+oFtDtbtD1HjODM9mtpa\n" \
	"HYrW/8uSszQXHlbfYcg/XUaG13A0dgeQCjKjUzBRMB0GA1UdDgQWBBSUbX9G7uSo\n" \
	"0/3xa8HwS1M+EqeVhzAfBgNVHSMEGDAWgBSUbX9G7uSo0/3xa8HwS1M+EqeVhzAP\n" \
	"BgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQCBqLcYb1oxv46oWm6w\n" \
	"IGrvXjd2gxyC4x0nVrBo8nNCbQIhAML5pN0g2vnnOWZN9Nqf+CYQDkSqjw/fhAhF\n" \
	"dIXAtAOR\n" \
	"-----END CERTIFICATE-----\n"

/* Another P-256 key, SEC1 */
#define PEM_EC2_KEY \
	"-----BEGIN EC PRIVATE KEY-----\n" \
	"MHcCAQEEIHFvYdlF5x0G6CgRgUzCl8AYxzS4Cxoob1Grd7nX3z5xoAoGCCqGSM49\n" \
	"AwEHoUQDQgAEm2928ugsXNvaIt49kMnI/oC09Kd6N4KU/R6+Adh0lXZE+vHPmWjn\n" \
	"kC7woxpUuNOdyvEmUWWc6SG5txrqg8b5XQ==\n" \
	"-----END EC PRIVATE KEY-----\n"

/* Its certificate */
#define PEM_EC2_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIBgjCCASmgAwIBAgIUfWIgyItcvVzfS/dr5h6NCaBf2qQwCgYIKoZIzj0EAwIw\n" \
	"FjEUMBIGA1UEAwwLZWMyLmV4YW1wbGUwIBcNMjYxMTIyMTAwMDA3WhgPMjEyNjEw\n" \
	"MjkxMDAwMDdaMBYxFDASBgNVBAMMC2VjMi5leGFtcGxlMFkwEwYHKoZIzj0CAQYI\n" \
	"KoZIzj0DAQcDQgAEm2928ugsXNvaIt49kMnI/oC09Kd6N4KU/R6+Adh0lXZE+vHP\n" \
	"mWjnkC7woxpUuNOdyvEmUWWc6SG5txrqg8b5XaNTMFEwHQYDVR0OBBYEFOhIGxfk\n" \
	"zEH5r8HArMKh9Zq4MUzfMB8GA1UdIwQYMBaAFOhIGxfkzEH5r8HArMKh9Zq4MUzf\n" \
	"MA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgexvaR9C5O4Y0FJ4k\n" \
	"CFlL7N4e/KtRzYkPT/WS9etX+ogCIGy9j/yFhPvS5WrWQQ2a2Y7JCYpQi+2Sz5Cd\n" \
	"TJbXQR/C\n" \
	"-----END CERTIFICATE-----\n"

/* P-384, SEC1 */
#define PEM_P384_KEY \
	"-----BEGIN EC PRIVATE KEY-----\n" \
	"MIGkAgEBBDDoafQVL9W2vZy+UoW9iDzN2PUQifRxHDOscM+1VlpTE6rk7biK3h3B\n" \
	"EJtF2SEfyQegBwYFK4EEACKhZANiAATAjymOeWKnnz4NTPj6xqBHLqZERbOnAe/s\n" \
	"QdKaPTxcmAQ9t/VgDiCHQokVuzBejGWaCN2mJCANe/bckCM7yvf0G+z+rtub5zU6\n" \
	"M47dW9VqxPHTy8pRKc5PA56yPF+uYDA=\n" \
	"-----END EC PRIVATE KEY-----\n"

/* Its certificate */
#define PEM_P384_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIBwjCCAUigAwIBAgIUYI8G8C3g7yTl6ut1PpR9QatFAvMwCgYIKoZIzj0EAwIw\n" \
	"FzEVMBMGA1UEAwwMcDM4NC5leGFtcGxlMCAXDTI2MTEyMjEwMDAwN1oYDzIxMjYx\n" \
	"MDI5MTAwMDA3WjAXMRUwEwYDVQQDDAxwMzg0LmV4YW1wbGUwdjAQBgcqhkjOPQIB\n" \
	"BgUrgQQAIgNiAATAjymOeWKnnz4NTPj6xqBHLqZERbOnAe/sQdKaPTxcmAQ9t/Vg\n" \
	"DiCHQokVuzBejGWaCN2mJCANe/bckCM7yvf0G+z+rtub5zU6M47dW9VqxPHTy8pR\n" \
	"Kc5PA56yPF+uYDCjUzBRMB0GA1UdDgQWBBQ5htvCGGW2/1C2sJjYfhC1hik+DTAf\n" \
	"BgNVHSMEGDAWgBQ5htvCGGW2/1C2sJjYfhC1hik+DTAPBgNVHRMBAf8EBTADAQH/\n" \
	"MAoGCCqGSM49BAMCA2gAMGUCMGO5B1oUXzbheLOcjjOgru2eIbXCPpQxE3IGWOek\n" \
	"6y14v1JVlFWUZhfi3zahmZYOCQIxAMz7Yd6sfQfWvR87lEYNJC78Sjd1uXDJFGKr\n" \
	"P4ibs/y5CzxqzTaBQj55iagfBjsNgA==\n" \
	"-----END CERTIFICATE-----\n"

/* RSA 2048, PKCS#1 */
#define PEM_RSA_KEY \
	"-----BEGIN RSA PRIVATE KEY-----\n" \
	"MIIEowIBAAKCAQEA1Hib7Ak4QUmo08JZ69XZH8QUGFvXXXpwcEwPTPfNkHL0cjRe\n" \
	"//QB9RRDNXUX0F+oZuIe6tL+3IsHH4DY+Iae2N33s3j24hvHqayWPLD7S8pgjD4O\n" \
	"ONtN23XAFNB1C24IE0mkoUy0VOFCpRr5ZDPtad8HhXTTMPcfnqX9WavnqFyIIBAu\n" \
	"V3dFTFyc8q2enxxKg6aex9UDesjAfVdvZihzyNvtvkQZdUtaEWjntsvRlweFecMy\n" \
	"nIj/Y9d0u3WSZIiE1PhpkAu9ZrZbx5pABYLU14spZ7VbJR5Pj/NAbBRY+C08yWoX\n" \
	"iVdi0A7Wl1yz3xFUtJafiiaavvQsbcI3SdKMPQIDAQABAoIBACixxgluFaJ5kXan\n" \
	"j5H6NjkdlMy6kHQEvrLfeoG/J5XeUp/qFHT4/wP6AspjGDHOlIJKFmpbCbnjffSE\n" \
	"eOoW3KdEUkxDY6PYdsQyfF749dSlGRtbSl2M8WtScPz7lSNginbpQLktKA/myh01\n" \
	"3qTYxkTkFPx0bPvApUN9Xto1MOw/nRwCLXwHdYrzcY1eJt/bF1i1VQbGMQSkNCkJ\n" \
	"6OrdMQVUiTEDJGgMTx82vdDwGkhlRwZwOte/B5y4Xf8Tf1f9S5kH6tKBnx85e8l/\n" \
	"G/+0EykpGlDzFVqLfGXCS6ozySkoHABgvULmL+ARL7O62RqcmpL2oJsVJHrOrVWh\n" \
	"MQ+VIDkCgYEA/nua4Ii2NsmlYrLdBtCQ32gSJkxyGpdA02GQLOYwVcmPzayTzn2d\n" \
	"PZm96Xb5PiWI7yaWynZgeSahPqYbXvnsTAPslsTUhgz58oV1/r1GfBFqcf93PQjK\n" \
	"XcXPlS7nqvdxO177952vxKJeZN/EzbY4FyHm2b1Dgmcy/snGGeCht/kCgYEA1bzi\n" \
	"oVCX5gtOBBwzkFOuprsUHIpPlbehwAAlqv868BVIIKEEIdkJp5hJeusziH8aBbYm\n" \
	"Klffg5kV3vfoVV+8rF3YnC7ujqsvc96ABXKiiZV/CZtvfgJeYKkhr+OWJMxhcxn3\n" \
	"zTzFVSEmenp5cBMk88Xx2FrzrLxrffBKjzVAb2UCgYAJUb16O4dwujG0S5iMh1bG\n" \
	"16jSfjovfxqAozIEcumSOq9peMhw52i6uMabph+6huVc3Kzo/SzLQv7krHCUKdLd\n" \
	"dcdUPiEKR69fkkOf8I6EPJ8JTbGwKoI+rN/NNsqFGEqtQe04RC4LpWaPiyJJ5kJn\n" \
	"lnY9wxCV1fGoIvt+Nxu1AQKBgQCmAh0sGgLA5ErmGllaYgSm72sBd9O0f3ocPIEF\n" \
	"PVOzoXPyE923xHEhQMDhvci63a2CfiVKghHSjpZUJczIcqGCZymUtUcIfKFQp6Jb\n" \
	"mNvxbLHM7nM8Ne7DuNm3WVcGoc+WrLaxK+BA7IyMWI/1oojy5e2fk5TrtzTuDjJ6\n" \
	"5Gt1mQKBgD4ce+frm4uGKQ6BY2IqaMFrS2TXNLItAWZRuMnDiMGfg1ojU7KzdV7C\n" \
	"zH3gRtZm/FV7IHvd8Wjkf16xr0/Sq3ZMqTFgpsyMIaJhi74+cG3ylzeeMfEpShSk\n" \
	"EPLqNh14KyGNK+Y7YbGTSmOj9iL6yB70EB0njXIRUtHQZI/AvvQp\n" \
	"-----END RSA PRIVATE KEY-----\n"

/* The same, PKCS#8 */
#define PEM_RSA_KEY8 \
	"-----BEGIN PRIVATE KEY-----\n" \
	"MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDUeJvsCThBSajT\n" \
	"wlnr1dkfxBQYW9ddenBwTA9M982QcvRyNF7/9AH1FEM1dRfQX6hm4h7q0v7ciwcf\n" \
	"gNj4hp7Y3fezePbiG8eprJY8sPtLymCMPg44203bdcAU0HULbggTSaShTLRU4UKl\n" \
	"GvlkM+1p3weFdNMw9x+epf1Zq+eoXIggEC5Xd0VMXJzyrZ6fHEqDpp7H1QN6yMB9\n" \
	"V29mKHPI2+2+RBl1S1oRaOe2y9GXB4V5wzKciP9j13S7dZJkiITU+GmQC71mtlvH\n" \
	"mkAFgtTXiylntVslHk+P80BsFFj4LTzJaheJV2LQDtaXXLPfEVS0lp+KJpq+9Cxt\n" \
	"wjdJ0ow9AgMBAAECggEAKLHGCW4VonmRdqePkfo2OR2UzLqQdAS+st96gb8nld5S\n" \
	"n+oUdPj/A/oCymMYMc6UgkoWalsJueN99IR46hbcp0RSTENjo9h2xDJ8Xvj11KUZ\n" \
	"G1tKXYzxa1Jw/PuVI2CKdulAuS0oD+bKHTXepNjGROQU/HRs+8ClQ31e2jUw7D+d\n" \
	"HAItfAd1ivNxjV4m39sXWLVVBsYxBKQ0KQno6t0xBVSJMQMkaAxPHza90PAaSGVH\n" \
	"BnA6178HnLhd/xN/V/1LmQfq0oGfHzl7yX8b/7QTKSkaUPMVWot8ZcJLqjPJKSgc\n" \
	"AGC9QuYv4BEvs7rZGpyakvagmxUkes6tVaExD5UgOQKBgQD+e5rgiLY2yaVist0G\n" \
	"0JDfaBImTHIal0DTYZAs5jBVyY/NrJPOfZ09mb3pdvk+JYjvJpbKdmB5JqE+phte\n" \
	"+exMA+yWxNSGDPnyhXX+vUZ8EWpx/3c9CMpdxc+VLueq93E7Xvv3na/Eol5k38TN\n" \
	"tjgXIebZvUOCZzL+ycYZ4KG3+QKBgQDVvOKhUJfmC04EHDOQU66muxQcik+Vt6HA\n" \
	"ACWq/zrwFUggoQQh2QmnmEl66zOIfxoFtiYqV9+DmRXe9+hVX7ysXdicLu6Oqy9z\n" \
	"3oAFcqKJlX8Jm29+Al5gqSGv45YkzGFzGffNPMVVISZ6enlwEyTzxfHYWvOsvGt9\n" \
	"8EqPNUBvZQKBgAlRvXo7h3C6MbRLmIyHVsbXqNJ+Oi9/GoCjMgRy6ZI6r2l4yHDn\n" \
	"aLq4xpumH7qG5VzcrOj9LMtC/uSscJQp0t11x1Q+IQpHr1+SQ5/wjoQ8nwlNsbAq\n" \
	"gj6s3802yoUYSq1B7ThELgulZo+LIknmQmeWdj3DEJXV8agi+343G7UBAoGBAKYC\n" \
	"HSwaAsDkSuYaWVpiBKbvawF307R/ehw8gQU9U7Ohc/IT3bfEcSFAwOG9yLrdrYJ+\n" \
	"JUqCEdKOllQlzMhyoYJnKZS1Rwh8oVCnoluY2/Fssczuczw17sO42bdZVwahz5as\n" \
	"trEr4EDsjIxYj/WiiPLl7Z+TlOu3NO4OMnrka3WZAoGAPhx75+ubi4YpDoFjYipo\n" \
	"wWtLZNc0si0BZlG4ycOIwZ+DWiNTsrN1XsLMfeBG1mb8VXsge93xaOR/XrGvT9Kr\n" \
	"dkypMWCmzIwhomGLvj5wbfKXN54x8SlKFKQQ8uo2HXgrIY0r5jthsZNKY6P2IvrI\n" \
	"HvQQHSeNchFS0dBkj8C+9Ck=\n" \
	"-----END PRIVATE KEY-----\n"

/* Its certificate */
#define PEM_RSA_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIDDzCCAfegAwIBAgIUB3DFk/BYyaVRLo18gxS9B23GaKgwDQYJKoZIhvcNAQEL\n" \
	"BQAwFjEUMBIGA1UEAwwLcnNhLmV4YW1wbGUwIBcNMjYxMTIyMTAwMDA3WhgPMjEy\n" \
	"NjEwMjkxMDAwMDdaMBYxFDASBgNVBAMMC3JzYS5leGFtcGxlMIIBIjANBgkqhkiG\n" \
	"9w0BAQEFAAOCAQ8AMIIBCgKCAQEA1Hib7Ak4QUmo08JZ69XZH8QUGFvXXXpwcEwP\n" \
	"TPfNkHL0cjRe//QB9RRDNXUX0F+oZuIe6tL+3IsHH4DY+Iae2N33s3j24hvHqayW\n" \
	"PLD7S8pgjD4OONtN23XAFNB1C24IE0mkoUy0VOFCpRr5ZDPtad8HhXTTMPcfnqX9\n" \
	"WavnqFyIIBAuV3dFTFyc8q2enxxKg6aex9UDesjAfVdvZihzyNvtvkQZdUtaEWjn\n" \
	"tsvRlweFecMynIj/Y9d0u3WSZIiE1PhpkAu9ZrZbx5pABYLU14spZ7VbJR5Pj/NA\n" \
	"bBRY+C08yWoXiVdi0A7Wl1yz3xFUtJafiiaavvQsbcI3SdKMPQIDAQABo1MwUTAd\n" \
	"BgNVHQ4EFgQUmTDa2ZfSgtZn07Ko52SuHVgJZxYwHwYDVR0jBBgwFoAUmTDa2ZfS\n" \
	"gtZn07Ko52SuHVgJZxYwDwYDVR0TAQH/BAUwAwEB/zANBgkqhkiG9w0BAQsFAAOC\n" \
	"AQEA00JtTKRxnZFQqKwdzxR698yar42GH2LhaHN6UbvTKUTijXiC4veE/LD/uR5i\n" \
	"77Maz6I3Ebi5ncplsFcv6Umsc0XqEgciPDdsg94SC+rwq0ZLsXU4V7T8e0xC5/zV\n" \
	"nuo1AJVZUd6SoNuWyALDvdzIYOZr0Jz0Uy6XMybpwr6sI+9n6XszeeNY3xKbNn+Q\n" \
	"Upi8jbloBgWXHPpb86gjq7oVRr4XaFKALxyAVvbaqHKmzlzpudb4ufuPYIRwZpoS\n" \
	"+92EB3eNHoNh+jhFfo0Ic65dhD2mhKQGIQIzHgj8YAqFbqqsXQTO2aC8K6ua3aJs\n" \
	"8RGWk0jo9cHsX80OlhmosCcaVA==\n" \
	"-----END CERTIFICATE-----\n"

/* Another RSA 2048 key, PKCS#1 */
#define PEM_RSA2_KEY \
	"-----BEGIN RSA PRIVATE KEY-----\n" \
	"MIIEpAIBAAKCAQEAuBox0ExfDXaRwffpNli0e1sLTMBtAHoThmSbVCczSAdx/kKZ\n" \
	"u1YyGgt4vd3CStdBnf+5ZdgpwdbDptrTGip5wdeDVx35BTdURYKf+JY3bX6uRalq\n" \
	"jQQWNr/jcqRC3skd/97ZBDH4WEbBwrxqti8g8gzkyGzXuh9OEP8K7TX79XBN7Cry\n" \
	"7mbQ9Cc2ybEJySq1TnZJxHPrK9L7hhcbWVbN7DCieJ+OSQOC1kEh9D8dReevZNVL\n" \
	"5d7BtHs9SMBEVyBQnAz2HJbncME/xHltk3GLFRaXomo+sgi/K2TtX1wF7L338C0V\n" \
	"F6RszKOZAGXQ/84KrvMkakLXD+zp6lwgSWs/8QIDAQABAoIBAAedikZXdWZcO23o\n" \
	"jk6ho1gXsVdHva6LjjGUyW3VCAiUicMqsDslBvInu7MvaFdCEZhafNndE+edNZdK\n" \
	"JZm3THVvr7K3pj6QbgmIzGsbFCCA8S6nohUimFRkEkGSkMNQUo/MMSIMut0UcrUG\n" \
	"aBvghdJrZP6TLYaI/1jBwwsCTNmHfW9BVjyBPUGebOxVdXVdT3xblaFzByBaW3B+\n" \
	"7Dnoa3plj5x15dvHgpg4ybmz5QJElwHDiD65lvWesM7cL668RkQn8VDbU0eIb+e7\n" \
	"78qXlhTjTaSh8hfABq/RNgq0nutZb89SmI1Pi3hXtwe0p511zwV76TOgFUc6gRxl\n" \
	"GZFNAqECgYEA5AD3w4qma8JmOmI5/xm3mZ4iQXVryQ3jVE6Cab3Vhh0w8mFoX0h9\n" \
	"bzZR2J51wByFHnEClJlRQFCB0ZY2jtlvwebU/z9Z3EkyTNwkDaluQU+JeCFN6iwr\n" \
	"1OZVYOK0fzkBzprgoKiES/0Iguxw3O2RNOMnegJymzMX4YbuRLSSKmECgYEAzrU8\n" \
	"W46+f+uXWWI3qvQfrHYQE+Wna+vOU47fdRAV53CoQS8Qk/B3BtAr0pHXD2qv+wsP\n" \
	"wn6WhKJx3TNBbEQhoM3bhg9o9BpSxZZmH0dFNwqG9t59ai655IGpFdo6Mn0wup3K\n" \
	"TDP0XJ7uniICgnJRYDrRo38qFt/wf4q7/4Kvn5ECgYEAgaGfPJj/B7NuRfGFAeoQ\n" \
	"PhHvbgIhtxzjTBKbCR26YdcE9jm1ir7/OhTLMfrd/cz5TpZ4Hh6RWJytQolCGbO8\n" \
	"W6UvIrRVFe6z34kmInJbUlyzTw64atSUUyZmEoCymMbDpUDfR9in50BE75MYlDOp\n" \
	"5ETmM/NiT6UcBciefYegtuECgYEAmt7y/+4tEI6k8NVDvBP3/zDdzuqLy7H6/mPX\n" \
	"TE/m+WZQybXHh+/sXfBuRO/735Mhksew4RoTEADdqsuSQtmxEFfsF79H9Uwbo+qR\n" \
	"TPILC7gZcrEz6fBkWq5CzxqX6+gcMFW0ke+DMDnrshLtKmsYSS8IjqTiFg1mlUiO\n" \
	"nlt91eECgYAKbFbWxmo4er3pGTWC57ezNu+PE8+SCkwJl3tYm71MDRCXG0ds9snU\n" \
	"K4v8Q0x7ak74p2U+1PFxSByfaoD8BYXIvb9eowQY0hZ8yWPvdq7t+WxEMZPhS4J4\n" \
	"Znm/x2ocbZqbwnsVUkStp1SFa4obmXL+Qw+Y18Ldb0L+HE4/OGOU7w==\n" \
	"-----END RSA PRIVATE KEY-----\n"

/* RSA 4096, PKCS#1 */
#define PEM_RSA4096_KEY \
	"-----BEGIN RSA PRIVATE KEY-----\n" \
	"MIIJKQIBAAKCAgEA1KniIMmda65vrbHFMzLIZ7Rw4Y7kocwtBG6gdN1jqHOvpHCR\n" \
	"iYv+3TxOvnWgtIYGsaZffCItEl3M6qUBjmCIEVSRqXvJ03kOifyLVTrdZcGgn3ka\n" \
	"2mS7hJWc78rYmzLPRQQdCLV29F6vtizXDpyovlb/lDDP+zqmP++n8EzISnFv5zZs\n" \
	"j1qWGXuJVg0TTpopPN3XSVC0tLx5SGXzxfw1nHunkaO9B1Wz7WMjIXf9NJODkMLy\n" \
	"Xoo6QcN9gTMe8TSti2JRHolcWHnj3v10z+P8X9G6uEc+h9NPpOMu1IjvtZI4h8aD\n" \
	"l8IrahMY0f35N1YIfxCmAA57ox6B6L5UpsGG8IuZUuQF3cCDe3yFImU4X382l+QE\n" \
	"C2I/3kgIl/Mxfrt2wACGMHdYU0K7ZxbWm5wPjMrT/rPH3CoyEAmSJFCGmvXNCkX8\n" \
	"sMA7CWPDjCaCKaoLWsBja7BnoNIKl5ad8pS0UBhDX81/A0OzH2n9Ev2Lnfwb0bHy\n" \
	"+XG2sXOsdbjNlloQ67Bf+/7oA7JGmgvNef2rMyMrK0CM8tLNf/CxE9lzwtNS9cOC\n" \
	"56F8zaml8g/7cMziXqrfTJDaUHySQyfxA8ZebP85ClhLeCY6anGWX1me9kJPSOM9\n" \
	"Oy8w/Ae3rzJXRE3RKK0/XRAnwlI8Nh4W5Ow1gEw50nKefQTEryG60TI462kCAwEA\n" \
	"AQKCAgAPymp8QUQzW/E2bkIEhnOLgcI0+WGAIxM/pkA7VToCZs6msOYZlr/OqRz2\n" \
	"tvC/HsmN9NrXsojyuWzPCoAGVKQd10/2i/bFQVKjS9GDu1p3pQw6cylbiInE80AD\n" \
	"LSZuxbPOvdqzDBhgVkyJRCSW1OqRsY+KLyKuVqFEE5U+elEP+ALVYfznGxSUoU/m\n" \
	"CBQELN29g4JqEvhMCEegKNPUQmEvtJ3Ral1Nl19EE+2mnUx7lC17eQI6o1xmiC/A\n" \
	"QW29fsoZFKyNzijBeBGDvAGpsxXI/p908fNSbg4WofjW9rEH5CrW6BZa1SPYnUDl\n" \
	"TMytv3Fjj/anf+vNxaTjRYivFiUhAjGjm+3bT8LxApEnF0cSEqLvv0neRZTqniS+\n" \
	"tFtg9xUWIeCBlFnYVAbcdCNT9N6H0AYQrmN5iqWaSqP9eQ2ZrldOq0B9tcTVj6DD\n" \
	"HR8IJwLVUHbLp6AS451TvXfP5sw+ziPvIOHsQnfbrAHvo7RGk63b2VqLCIRqJWNi\n" \
	"Zn2Pyn4bsk91fm8Qfq22JofyvXUYgbE1Aekk5ZXrAbQDSU8Wlk5Cr+q27KbIj7/0\n" \
	"VjHLeCERaBmIxFOumorPWWAOcgA8aw6XQ6+fupxhklJbRoeL1KDiQC2R74dDM1GJ\n" \
	"qVkxFS7uEFjphmNzZenxwKXMgCI4onFhzPiCa8Nrnlv7eDt0YQKCAQEA641NugFB\n" \
	"REywtiXk+wwbu3r1MBPB1mjdn4s7s7lUB9Q61LcLHE99nXsUtyhWGLUZf5uk6/Lo\n" \
	"DpRgwBv5zdklsohoj1UrvE2R34TNfvheLQaFrjgYkM6XX8hJc6n0u3x08MzyIK4R\n" \
	"yw0bRAOq1zsYKpMaNXaV1fWcnlGQBAzYfwkVaW2/EdSNqZXnEoYn8VHpiEwWdZdc\n" \
	"+lZ/CIOpdktz682xJxcjp/0HhEi/MHeadhD+qfdToKTS3D0BZ+INX0fk4GoeqUlM\n" \
	"nR+clkAiVfnYeufllhn6e6tq0TWGwje0KkDy1coIJcYnz8B5WQn4i7ZPF4Kzfcl6\n" \
	"NZThTyGpIw6U2QKCAQEA5x/t4cAoFeEvkeahJgm8ZS8gstPqaJ9fgYB1gdebD0Yh\n" \
	"bgIScAq7bXOJNCWG9ZPV1mYlzpwnkIPKwu4XaWi6P0HlRW9nHumsyI0/kxsYR465\n" \
	"nuNJNgyPyDvyiCPv0qkuB5wHSOLSfcjf0SOuotBlajDE49NJ/6h6mW8OlqaAifs2\n" \
	"6GPC9joDRYhl1rk9iVAR6w9WfjlC82V3opcT6RAJEuc8eU+QMJgiE0rpxHspXtoG\n" \
	"6uFFokLHF/rHMSEpMSSVBR9QW/yp9vgZnRs1OKE+cFc7DbPqq4qUReWMGGHTUy9z\n" \
	"3ThXH1TsXEx8wUlPBOIANPAiZZD0v7PGhZbPsa+xEQKCAQEAn1HAu8lzgqW4dErn\n" \
	"OKI087aztiP23HWrSOkcpW/5lR4H+K4htrFRTj3cghGnQijjqTr17p0qNgpH8kg5\n" \
	"yvBPnhTDXAcIgOGag6tIbtPApwWdT3wjqXYCTseiXrgajuEcG28TaeUypbsksPkm\n" \
	"CVOwAcPjWzvtFn18xFx4YzTpDetv7xJKxN2WP5jjZNUWmROFOCn2muyY972fSHv9\n" \
	"F8TrEBfc9YqiFFKBTgkCP971u1u9U+q0RpiVAl/E3qW307VF6j/8oxWv2ypxd/LD\n" \
	"BpHpyR+mWsMRd6o2onBoyF5y3o11cgKnRh1j+hG+QeoLkTvq/QTrMG4g2bLsPeCP\n" \
	"jOWk6QKCAQEAuIcBgc/NMUrMlAwydRAo3hA2ZxBSgp1bvyU0rCnbnuI7Jn15AwNO\n" \
	"iSBJVtzvV3pkq/x6Cu8Zl4PhiqhVAM+gg4i06C79gezHCofbTjO/usH06SpF9WUq\n" \
	"Fo/mH1Ox0dtI6MJl/oc5zztllrCKaWtAzPuK9upmljuJRp8oYpck4QU03W1o5vWC\n" \
	"Ty2LQVg8DTlkVOu1/qjxDyrfzWwZdWZcGD+ORLyFPob4Dbct1LUQXq5r/3NECTyP\n" \
	"gFG0X0E+hgHTCHfrzMV5XbjPmmNypnf2RfMfLt2KatMFdpjCtWTFOBEWzHSC+nzv\n" \
	"CPH4WMmS0S8vQxTGIZkOD1AVG+tAf3jqQQKCAQBWKPpWnUVhL4Tiu6OTP8AKhGlx\n" \
	"Kn0W0F6HEUKtNYjGWa5pvRNAQgBKTdWZ3TUz2aDs4/lLziWhCSpp9TnF/VaoRdC9\n" \
	"+hogF66DfpfAfW5OjDyLC7D9DPfdszF01lCs/yzcK4mRsy5qZmB4cXyf+ds/uTeb\n" \
	"mngeG0hEPeV2BS3hPjRfyDHPPRdQ+2lTS+NnqcapmarwJY5afK9CUL6osPOKGHAb\n" \
	"fXKznJfJUCDuZQNnKDf40MRYFgq1GJrzvG+rovYaHqlaAPgVdM3fTzCeckUa08Ui\n" \
	"z0+o06WFNBidvLYHjReJkE4nrqUz3vXEZXiVizk7/R4giuz/l/t0fzlaSGf9\n" \
	"-----END RSA PRIVATE KEY-----\n"

/* Its certificate */
#define PEM_RSA4096_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIFFzCCAv+gAwIBAgIUXWCey+ImaEqCVI+IFAjYOGYk/c0wDQYJKoZIhvcNAQEL\n" \
	"BQAwGjEYMBYGA1UEAwwPcnNhNDA5Ni5leGFtcGxlMCAXDTI2MTEyMjEwMDY1N1oY\n" \
	"DzIxMjYxMDI5MTAwNjU3WjAaMRgwFgYDVQQDDA9yc2E0MDk2LmV4YW1wbGUwggIi\n" \
	"MA0GCSqGSIb3DQEBAQUAA4ICDwAwggIKAoICAQDUqeIgyZ1rrm+tscUzMshntHDh\n" \
	"juShzC0EbqB03WOoc6+kcJGJi/7dPE6+daC0hgaxpl98Ii0SXczqpQGOYIgRVJGp\n" \
	"e8nTeQ6J/ItVOt1lwaCfeRraZLuElZzvytibMs9FBB0ItXb0Xq+2LNcOnKi+Vv+U\n" \
	"MM/7OqY/76fwTMhKcW/nNmyPWpYZe4lWDRNOmik83ddJULS0vHlIZfPF/DWce6eR\n" \
	"o70HVbPtYyMhd/00k4OQwvJeijpBw32BMx7xNK2LYlEeiVxYeePe/XTP4/xf0bq4\n" \
	"Rz6H00+k4y7UiO+1kjiHxoOXwitqExjR/fk3Vgh/EKYADnujHoHovlSmwYbwi5lS\n" \
	"5AXdwIN7fIUiZThffzaX5AQLYj/eSAiX8zF+u3bAAIYwd1hTQrtnFtabnA+MytP+\n" \
	"s8fcKjIQCZIkUIaa9c0KRfywwDsJY8OMJoIpqgtawGNrsGeg0gqXlp3ylLRQGENf\n" \
	"zX8DQ7Mfaf0S/Yud/BvRsfL5cbaxc6x1uM2WWhDrsF/7/ugDskaaC815/aszIysr\n" \
	"QIzy0s1/8LET2XPC01L1w4LnoXzNqaXyD/twzOJeqt9MkNpQfJJDJ/EDxl5s/zkK\n" \
	"WEt4JjpqcZZfWZ72Qk9I4z07LzD8B7evMldETdEorT9dECfCUjw2Hhbk7DWATDnS\n" \
	"cp59BMSvIbrRMjjraQIDAQABo1MwUTAdBgNVHQ4EFgQUUqaFirNs6HYMtiXinACw\n" \
	"eGVpSNowHwYDVR0jBBgwFoAUUqaFirNs6HYMtiXinACweGVpSNowDwYDVR0TAQH/\n" \
	"BAUwAwEB/zANBgkqhkiG9w0BAQsFAAOCAgEAMaKZqUjKzvGCh3OQ3QJh/OHg8Gtw\n" \
	"CfPCdYBtB979lZQMvoUq1/aA8sDyqIeWE0CX9CCvrKsWtGAwbaypEy0/Zxs29IUn\n" \
	"nV/mtqjScLxA+PgoLPD5tq6SdNNS+i1KzTiHZhb5RvvzvNoIo7vULhK/ANeGcg12\n" \
	"SwHgza/AeYJpWg8gfPc+FqMxN+DHTAdF9eBp2SDN46ocGXyTN56keNwYrQylLpla\n" \
	"oIo0+rcZaTI3TRnTzhwwYQoVlBsgdP00ejzN2Cj6/3+35rCYzbUzfqcooLYPIBuq\n" \
	"MqLu7X/q4HD8oxgY1lKstUz+F+dR8QF9A6SW4Jocx3rriUQK3jeayKxoGiHVkVJc\n" \
	"h6It71neAIoI7Ty0TGG3j1uEl/jcvOxsEgbdP+bfCLfIojz6EsYBgLSMRyMl1Ugd\n" \
	"5KOvS8LCu2N91sw3yGQL8Z0aE/nBk1JmDO8Uu+YKTs5GIkM8Ik2dseEbuZomYsrV\n" \
	"DM0X1rTuNIFJul/RKzaYtlfViyjYz9bB1T8WSRMEGawmwYhvi2w5ERbOOczCnNts\n" \
	"fmgppb6gEpRxU1IH3d0JLGVhpaJp0UKXJ4eWSRsC4NN+Kbw8GNZTcgYgsniTbDl5\n" \
	"NhMQeIflT8k4sX1QD9FslcF5iboM4EbsIfVtK1unBg5HUDIRzBV9daeiV04sGuxn\n" \
	"9fv1h5a/KQCeMzA=\n" \
	"-----END CERTIFICATE-----\n"

/* Ed25519, which BearSSL does not know */
#define PEM_ED25519_KEY \
	"-----BEGIN PRIVATE KEY-----\n" \
	"MC4CAQAwBQYDK2VwBCIEIFzbQ8uND+ekRopM1I24WD6rSS8ZWNJzicdADhYepyZC\n" \
	"-----END PRIVATE KEY-----\n"

/* A root of it, O=Odd Company, CN=Odd Root */
#define PEM_ED25519_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIBaTCCARugAwIBAgIUder9q6NfvdhibDZRQhiMku1H+lIwBQYDK2VwMCkxFDAS\n" \
	"BgNVBAoMC09kZCBDb21wYW55MREwDwYDVQQDDAhPZGQgUm9vdDAgFw0yNjExMjgw\n" \
	"MjUxMTFaGA8yMTI2MTEwNDAyNTExMVowKTEUMBIGA1UECgwLT2RkIENvbXBhbnkx\n" \
	"ETAPBgNVBAMMCE9kZCBSb290MCowBQYDK2VwAyEAU+mA3uC84D9qrTsxWsOycaaC\n" \
	"haTvV1MHGipswGfbUXqjUzBRMB0GA1UdDgQWBBQ2CAmj0orScTNGP3CjwrYzN9UP\n" \
	"ZzAfBgNVHSMEGDAWgBQ2CAmj0orScTNGP3CjwrYzN9UPZzAPBgNVHRMBAf8EBTAD\n" \
	"AQH/MAUGAytlcANBAJ5uIOdTQEsuM5qwVkTyEjBeqOlMiuwU8vXSmznBrsn8FBuK\n" \
	"wbg9Fq/MhgaIleDv/IDMEiW0vRTC0J4aZMnswAo=\n" \
	"-----END CERTIFICATE-----\n"

/* A root whose key is for RSA-PSS only, O=Odd Company, OU=Odd Unit */
#define PEM_PSS_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIICljCCAcugAwIBAgIUCScMmYpgKsn+PEck5/Wzv0c2GeEwQQYJKoZIhvcNAQEK\n" \
	"MDSgDzANBglghkgBZQMEAgEFAKEcMBoGCSqGSIb3DQEBCDANBglghkgBZQMEAgEF\n" \
	"AKIDAgFeMCkxFDASBgNVBAoMC09kZCBDb21wYW55MREwDwYDVQQLDAhPZGQgVW5p\n" \
	"dDAgFw0yNjExMjgwMjUxMTFaGA8yMTI2MTEwNDAyNTExMVowKTEUMBIGA1UECgwL\n" \
	"T2RkIENvbXBhbnkxETAPBgNVBAsMCE9kZCBVbml0MIGdMAsGCSqGSIb3DQEBCgOB\n" \
	"jQAwgYkCgYEAoeEN1guI+ILWri8I1IhKKQFJTqvzYpdtNp8kV5wOwTyh9MiYpbft\n" \
	"dRDIyR/nerdrUKZXYzgMowAqh3c8VV0lGJJF7GABNLpBleukL6cYRtPD/lk4/119\n" \
	"OGLWyFhLzbzl42tXi7Cnuywif9G53Ntml15pSAtRGrzA47KxB4yjDkECAwEAAaNT\n" \
	"MFEwHQYDVR0OBBYEFGFeB6DrBGPSDoE7/0FBNwPgsKpQMB8GA1UdIwQYMBaAFGFe\n" \
	"B6DrBGPSDoE7/0FBNwPgsKpQMA8GA1UdEwEB/wQFMAMBAf8wQQYJKoZIhvcNAQEK\n" \
	"MDSgDzANBglghkgBZQMEAgEFAKEcMBoGCSqGSIb3DQEBCDANBglghkgBZQMEAgEF\n" \
	"AKIDAgFeA4GBAJBdkVMC6ogjkMOmos8FJrXi5PAQNGSSRPXGm9EsGAwKd4Addht4\n" \
	"Kl2KXZoBqnJ1lerxnbKUdzFrcDBy5PYfnSjxEnvfoh68lG2qOghILowxv3bbDsVE\n" \
	"B8ARh8jev3gU103S2UL/0YWRilorjZ52dF3YVTTMAdSov5SMSB7exO7Y\n" \
	"-----END CERTIFICATE-----\n"

/* A root with an RSA key of 4104 bits, and but an emailAddress */
#define PEM_RSA4104_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIFITCCAwigAwIBAgIUDFR2Lfmm6VygponYjhkAxefz2NowDQYJKoZIhvcNAQEL\n" \
	"BQAwHjEcMBoGCSqGSIb3DQEJARYNb2RkQGEuZXhhbXBsZTAgFw0yNjExMjgwMjUx\n" \
	"MTVaGA8yMTI2MTEwNDAyNTExNVowHjEcMBoGCSqGSIb3DQEJARYNb2RkQGEuZXhh\n" \
	"bXBsZTCCAiMwDQYJKoZIhvcNAQEBBQADggIQADCCAgsCggICAL9U0HM4v57VDRDS\n" \
	"Ox6j3d8QjZXrrGtPvNR45rmPHV7GBCze/IM43+OBdhm6h8ecq5+zBiypEaaSiboB\n" \
	"Y73nG6ihepRHmMMijgSSA4PsGz14MKF5qhloihswgVx8luOHtp3suokdNW56vHgw\n" \
	"HP28NeO+Qdbe/WtMgOVSVlcmJ8D4xY7enOk7iEHt/CftYWjd05CKbITpOYvWpmJH\n" \
	"295w4OL242OJzgzSK14DQREdNtf2WJdEwswO4OffMKW1v/uyACd6B9qXf8uxso1u\n" \
	"YaUhoPPXEmrFHxFI7vvnq3V6GMg46/6e5s/xkjorcmeMU1i7GIOsSi81dQfA094F\n" \
	"wJREF3PYpLjp/dkys4v6x8kQzSDss3gx0TYWx8hIoXnRc2x/srt5Ucj4esIDE9+j\n" \
	"bdejGkFLrw/xjnDGmKheiJGJRh4DdDwbWncK/SATQtBmDeJOzit+dVxOF3SsDhrV\n" \
	"uN8+4R9/5XP5fNOUE7LhoaSCe7ooHSxxH4m5YKKcEH02r/1tkmqHuNm8+F+cQfp8\n" \
	"7GpVBq5iAJYPn5KEX/QRzVVVRBetiabIYkAQ/vwD6o8FCBzSaZV6n3L7UISOiQtp\n" \
	"GJukeuJhZbax3aSMSYlEZA4qv/0slSS4/S5vGPXGZLoUCrt1POQaprvioNjoOMqa\n" \
	"/M/7iZ31HmZEySDCL3I5F337mjrAiQIDAQABo1MwUTAdBgNVHQ4EFgQU2SiQsnzD\n" \
	"0bGGqgth4qlXLxLhXBEwHwYDVR0jBBgwFoAU2SiQsnzD0bGGqgth4qlXLxLhXBEw\n" \
	"DwYDVR0TAQH/BAUwAwEB/zANBgkqhkiG9w0BAQsFAAOCAgIAKW4vtQr31McikvGU\n" \
	"AZPxFLPN7/A2zybZdnle9565sqK/P6upZyqhpVyK7POjotNZB2VpN4eGD268M5Gp\n" \
	"ZnwNqvuIYS1ZuEZzAI30/0Q/gHxijOMse4wnqGfqILbbb5IeLzmVL2rAvuHLs9+b\n" \
	"23JkE8D2M8dTPuFPJDC8jJUszry+VskkcVrZlm9JoTuwSy51kGSelnF2XTyndH7g\n" \
	"3pE6tk19/J4Ejpn1t+mt8g1AI2L9FVcntcBLgUbWz+NAoxWfYIi3CTy6MWy9KQHk\n" \
	"SqNG0TyIxfYPydF/y6YKyBgzELjq6VAaKZcoUWgTQLO2TUqMFk79stsFWGDCtFTX\n" \
	"7yRtJRP4GUmsoh8dopz61t3qaE4zVD1F06gSs6/85zIk77vMq97rKiwkb/E/OmoN\n" \
	"O0e/abDWjCyLya0lhFNiX/enT7BnHozfNcEN/LVibVEzxRLet4E1xIgfOq+y9o3q\n" \
	"Bm1jar5SWSMoKb84c5vQF6RlffX2cAGLb750MxfAEIKFtkiDyZ/ASAz47Odegzwo\n" \
	"pY+Fr3fyG9acvGsidz9Dxr2oWkF561W38QlssaB7RUR5ouB4beLK6tA0179rFklx\n" \
	"LgG1goHNx08qNUgB4LwmkK2XDTAIX4+HzEjS2JWxE7GVuMZfPOPHcCa7tEiWh5Yb\n" \
	"spArkaDe69c5wdNxQHrZagNJmbyw\n" \
	"-----END CERTIFICATE-----\n"

/* No certificate */
#define PEM_NO_CERT \
	"-----BEGIN CERTIFICATE-----\nMIIAAAAAAAA=\n-----END CERTIFICATE-----\n"

/* A key behind a password */
#define PEM_ENCRYPTED_KEY \
	"-----BEGIN ENCRYPTED PRIVATE KEY-----\n" \
	"MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAjnD9DSd+e54gICCAAw\n" \
	"DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEENORP1UgrnwQsFJBjg5ev8YEgZAq\n" \
	"8K9fnmV5b77cRvIJ5uYjzW7NR4j++dV2xvj5k7FMx18bTvc28M2v5Iqov0Ig6SKh\n" \
	"i0TErW8AIykq5CHzSMPGQ4kNKlSKOrlNf2+3jdf4fETwBC+zEbNkCwvK8vpMwpuc\n" \
	"/9WZALzAEUBhckSUM+TT5RgLLR4bB4fIPD4HuAmP2sh97pc3WeDJwpMIbPCrehs=\n" \
	"-----END ENCRYPTED PRIVATE KEY-----\n"
